"""The page of an experiment answers first, shows its tables and further figures, escapes everything, and needs nothing from outside."""

import base64
import csv
import json

import numpy as np
import pytest

from bsjax.analysis import (
  judge_estimators_agree,
  judge_layernorm_predicts_total,
  judge_noise_grows,
  judge_temperature,
  measurements_table,
)
from bsjax.report import Page, Table, noise_page, render_experiment, write_experiment
from tests.analysis import simulate_noise
from tests.report.example import make_environment
from tests.report.test_page import HOSTILE, PNG
from tests.report.test_page import Page as Html

RECORDS = simulate_noise.along_trials(sem=0.02) + simulate_noise.temperature_trials()
JUDGES = (judge_noise_grows, judge_temperature, judge_estimators_agree, judge_layernorm_predicts_total)
NAMES = ["noise_grows", "noise_layers", "temperature", "estimators_agree", "layernorm_predicts_total"]


@pytest.fixture(scope="module")
def findings():
  return [judge(simulate_noise.STUDY, RECORDS) for judge in JUDGES]


def make_page(**changes):
  page = Page(
    title="Short",
    question="What is asked?",
    lead="What was done.",
    answer="What came out.",
    tables=[
      Table(
        "The first table.",
        ("Name", "Size", "Ratio"),
        [("one", 1024, (2.0, 1.5, 3.0)), ("two", None, (None, None, None))],
      )
    ],
    fixed=[("Data", "the same throughout")],
  )
  return page._replace(**changes)


def make_study(**changes):
  branches = [
    {"name": name, "batch_size": size, "learning_rate": rate} for name, (size, rate) in simulate_noise.BRANCHES.items()
  ]
  study = {
    "workload": "digits_vit",
    "dataset": "digits",
    "train_size": 1024,
    "validation_size": 256,
    "test_size": 517,
    "num_params": 9000,
    "batch_norm": "none",
    "learning_rates": {"4": [0.02, 0.08], "32": [0.1]},
    "num_epochs": 8,
    "optimizer": "momentum",
    "momentum": 0.9,
    "seeds": [0, 1, 2],
    "branches": branches,
    "counts": {"complete": 70, "diverged": 1},
  }
  return study | changes


def render(findings, page=None, **changes):
  arguments = {"environment": make_environment(), "figures": dict.fromkeys(NAMES, PNG)}
  return Html(render_experiment(page or make_page(), findings=findings, **(arguments | changes)))


def test_question_answer_tables_claims_figures_and_facts_in_order(findings):
  page = render(findings)
  (title,) = page.having("title")
  assert title.text == "Short"
  order = [
    "What is asked?",
    "What was done.",
    "The answer",
    "What came out.",
    "The first table.",
    "The claims, measured",
    "claims hold",
    "The claims in figures",
    "1. Growth:",
    "4. Normalisation layers:",
    "the same throughout",
    "jax 0.10.2",
    "python -m experiments",
    "one row per measurement",
  ]
  places = [page.text.index(words) for words in order]
  assert places == sorted(places)


def test_cells_show_numbers_with_their_intervals_and_a_dash_where_there_is_none(findings):
  rows = [" ".join(row.text.split()) for row in render(findings).having("tr")][:3]
  assert rows == ["Name Size Ratio", "one 1,024 2.00 [1.50, 3.00]", "two – –"]


def test_further_figures_stand_below_their_claim(findings):
  figures = {name: PNG + name.encode() for name in NAMES}
  page = render(findings, figures=figures)
  images = [element.attributes["src"] for element in page.having("img")]
  assert [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images] == list(figures.values())
  assert len(page.having("article")) == len(findings)
  assert [article.text.count("Growth") for article in page.having("article")] == [1, 0, 0, 0]


def test_everything_from_outside_is_escaped_and_nothing_is_fetched(findings):
  hostile = [
    finding._replace(
      claim=finding.claim._replace(statement=HOSTILE, source=HOSTILE, expected=HOSTILE, unit=HOSTILE), reading=HOSTILE
    )
    for finding in findings
  ]
  table = Table(HOSTILE, (HOSTILE,), [(HOSTILE,)])
  texts = dict.fromkeys(("title", "question", "lead", "answer"), HOSTILE)
  page = render(hostile, make_page(**texts, tables=[table], fixed=[(HOSTILE, HOSTILE)]), environment={HOSTILE: HOSTILE})
  assert page.having("script") == []
  assert len(page.having("img")) == len(NAMES)
  assert {element.tag for element in page.elements} <= {element.tag for element in render(findings).elements}
  for element in page.elements:
    for name, value in element.attributes.items():
      assert not name.startswith("on")
      if name in ("src", "href"):
        assert value.startswith(("data:", "#"))
  # Question, lead, answer; the table's caption, head and cell; four fields of four claims, the statement once more, four readings; two
  # facts held fixed; the environment's name (with its underscores, of which it has none) and value.
  assert page.text.count(HOSTILE) == 3 + 3 + 4 * 5 + 4 + 2 + 2
  (policy,) = [element.attributes["content"] for element in page.having("meta") if "http-equiv" in element.attributes]
  assert policy.startswith("default-src 'none';")


def test_files_beside_the_page(findings, tmp_path):
  path = write_experiment(tmp_path, make_page(), findings=findings, environment={}, rows=measurements_table(RECORDS))
  assert path == tmp_path / "report.html"
  assert {file.name for file in (tmp_path / "figures").iterdir()} == {
    f"{name}.{end}" for name in NAMES for end in ("png", "pdf")
  }
  claims = json.loads((tmp_path / "claims.json").read_text())
  assert [claim["id"] for claim in claims] == [finding.claim.id for finding in findings]
  with open(tmp_path / "results.csv", newline="") as lines:
    rows = list(csv.DictReader(lines))
  assert len(rows) == sum(len(record.probes) for record in RECORDS)
  assert {"id", "batch_size", "learning_rate", "step", "noise_scale", "verdict"} <= rows[0].keys()


def test_the_noise_page_answers_with_the_findings_numbers(findings):
  page = noise_page(make_study(), findings)
  growth, temperature = findings[:2]
  settings, changes = page.tables
  np.testing.assert_allclose([row[3] for row in settings.rows], growth.series["start"])
  np.testing.assert_allclose([row[5] for row in settings.rows][0][0], growth.series["factor"][0])
  assert [row[:2] for row in settings.rows] == list(simulate_noise.SETTINGS)
  assert [row[0] for row in changes.rows] == list(temperature.series["factor_branch"])
  assert [row[1:3] for row in changes.rows] == [simulate_noise.BRANCHES[row[0]] for row in changes.rows]
  np.testing.assert_allclose([row[4][0] for row in changes.rows], temperature.series["factor"])
  text = render(findings, page).text
  assert "digits: 1,024 train examples, 256 validation examples, 517 test examples" in text
  assert "Optimizer momentum, momentum 0.9" in text
  assert "from batch size 16 and rate 0.1" in text
  assert "70 complete, 1 diverged" in text


def test_the_answer_is_the_range_over_the_settings(findings):
  growth = findings[0]
  series = growth.series | {"start": np.full(3, 12.0), "end": np.array([150.0, 34.0, 99.0])}
  page = noise_page(make_study(), [growth._replace(series=series), *findings[1:]])
  assert "is 12.0 examples at the first step and 34.0 to 150 at the end" in page.answer
  unseen = growth._replace(series=series | {"quantity": np.asarray("as estimated for unseen data")})
  assert "The noise scale as estimated for unseen data is" in noise_page(make_study(), [unseen, *findings[1:]]).answer


def test_a_study_that_measured_nothing_still_gives_a_page():
  findings = [judge(simulate_noise.STUDY, []) for judge in JUDGES]
  page = noise_page(make_study(branches=[]), findings)
  assert page.tables == []
  text = render(findings, page, figures={}).text
  assert "could not be measured" in text
  assert "not made: the training set is too small" in text
  assert "0 of 4 claims hold, 0 fail, 4 are inconclusive" in text
