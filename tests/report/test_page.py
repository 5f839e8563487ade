"""The page answers first, escapes everything, needs nothing from outside, and its files are whole and strict."""

import base64
import csv
import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest

import bsjax.report.batch_size
import bsjax.report.page
from bsjax.analysis import Claim, advise, judge_all
from bsjax.report import render_report, write_report
from tests.report.example import make_advice, make_claim, make_environment, make_findings, make_rows, make_study

PNG = base64.b64decode(
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>&amp;"""
WRITTEN = make_findings()[4:6]
VOID = {"meta", "link", "img", "br"}


@dataclasses.dataclass
class Element:
  """One element of the page: its tag, its attributes and all text inside it."""

  tag: str
  attributes: dict
  text: str = ""


class Page(HTMLParser):
  """Parse a page into its elements in order, and fail where a tag is not closed in its place."""

  def __init__(self, html):
    super().__init__(convert_charrefs=True)
    self.elements, self._open = [], []
    self.feed(html)
    self.close()
    assert self._open == []

  def handle_starttag(self, tag, attrs):
    element = Element(tag, dict(attrs))
    self.elements.append(element)
    if tag not in VOID:
      self._open.append(element)

  def handle_endtag(self, tag):
    assert self._open.pop().tag == tag

  def handle_data(self, data):
    for element in self._open:
      element.text += data

  def having(self, tag, class_name=None):
    """Return the elements of a tag, in order, that carry a class."""
    return [
      element
      for element in self.elements
      if element.tag == tag and (class_name is None or class_name in (element.attributes.get("class") or "").split())
    ]

  @property
  def text(self):
    """All text inside the body, with white space collapsed."""
    return " ".join(self.having("body")[0].text.split())


def render(**changes):
  arguments = {
    "study": make_study(),
    "findings": make_findings(),
    "advice": make_advice(),
    "environment": make_environment(),
    "figures": {finding.claim.id: PNG for finding in make_findings()},
  }
  return Page(render_report(**{**arguments, **changes}))


def test_the_answer_comes_first_and_the_rest_in_order():
  page = render()
  assert [heading.text for heading in page.having("h2")] == [
    "The answer",
    "The claims, measured",
    "One figure per claim",
    "What was held fixed",
    "Versions and device",
  ]
  text = page.text
  order = [
    "Use batch size 32 with learning rate 0.128.",
    "6.02 examples 95 % interval [5.10, 7.20]",
    "903 examples 95 % interval [640, 1,380]",
    "46.0 examples 95 % interval [39.0, 55.2]",
    "What each choice costs",
    "6 of 8 claims hold, 1 fails, 1 is inconclusive",
    "8. Learning rate",
    "a diverged trial enters no mean",
    "jax 0.10.2",
    "python -m experiments.batch_size_study",
  ]
  places = [text.index(words) for words in order]
  assert places == sorted(places)


@pytest.mark.parametrize(
  "words",
  [
    "A batch size is the number of examples behind one update",
    "The noise scale is the batch size, in examples, at which the noise of a minibatch gradient is as large as the gradient",
    "The batch size, in examples, at which a run takes twice the fewest possible steps and twice the fewest possible examples",
    "Sharpness is the largest eigenvalue of the Hessian",
    "At equal epochs every batch size sees the same number of examples",
    "at equal steps every batch size makes the same number of updates",
  ],
)
def test_terms_are_explained(words):
  assert words in render().text


def test_the_costs_of_every_choice_and_the_recommended_row():
  page = render()
  (table,) = page.having("table", "choices")
  rows = [" ".join(row.text.split()) for row in page.having("tr")][1:12]
  assert len(make_advice().table) == 11
  # B = 4: S = 38 (1 + 46/4) = 475 steps, of the fewest reached 38 (1 + 46/512) = 41.4, so 11.5 times; E = 1,900 examples of 1,786.
  assert rows[2].startswith("4 0.0160 475 11.5× 1,900 1.1×")
  assert rows[10].startswith("1,024 0.500 * not reached not reached –")
  (recommended,) = page.having("tr", "recommended")
  assert " ".join(recommended.text.split()).startswith("32 0.128")
  assert "recommended" in recommended.text
  assert table.text.count("recommended") == 1
  assert "* The best learning rate lies on the edge" in page.text
  assert "Not reached: not every seed reached the target" in page.text


def test_notes_appear_only_where_something_bears_them():
  table = [row for row in make_advice().table if row["batch_size"] < 1024]
  text = render(advice=make_advice(table=table)).text
  assert "* The best learning rate" not in text
  assert "Not reached" not in text


def test_every_claim_has_its_number_and_a_verdict_in_words():
  page = render()
  findings = make_findings()
  rows = page.having("tr")[-8:]
  for row, finding in zip(rows, findings, strict=True):
    claim = finding.claim
    for words in (claim.statement, claim.source, claim.expected, claim.unit, claim.verdict):
      assert words in row.text
  assert "−0.996 [−1.01, −0.985] slope of log variance against log B" in " ".join(rows[0].text.split())
  for verdict, mark in (("holds", "✓"), ("fails", "✗"), ("inconclusive", "?")):
    shown = page.having("span", verdict)
    # Each verdict stands in the table and beside its figure.
    assert len(shown) == 2 * sum(finding.claim.verdict == verdict for finding in findings)
    assert {badge.text for badge in shown} == {f"{mark} {verdict}"}


def test_every_claim_has_its_figure_and_reading_and_is_linked_to_them():
  figures = {finding.claim.id: PNG + finding.claim.id.encode() for finding in make_findings()}
  page = render(figures=figures)
  images = [element.attributes["src"] for element in page.having("img")]
  assert [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images] == list(figures.values())
  articles = page.having("article")
  for article, finding in zip(articles, make_findings(), strict=True):
    assert finding.reading in article.text
  links = [element.attributes["href"] for element in page.having("a")]
  assert links == [f"#{article.attributes['id']}" for article in articles]


def test_a_claim_without_a_figure_keeps_its_reading():
  page = render(figures={})
  assert page.having("img") == []
  assert all(finding.reading in page.text for finding in make_findings())


def test_nothing_is_fetched_and_nothing_runs():
  page = render()
  for element in page.elements:
    for name, value in element.attributes.items():
      assert not name.startswith("on")
      if name in ("src", "href"):
        assert value.startswith(("data:", "#"))
  (style,) = page.having("style")
  assert "url(" not in style.text
  assert "@import" not in style.text
  assert page.having("script") == []
  (policy,) = [element.attributes["content"] for element in page.having("meta") if "http-equiv" in element.attributes]
  assert policy.startswith("default-src 'none';")


def _hostile(value):
  """Replace every string inside a value, keys included, by hostile text."""
  if isinstance(value, str):
    return HOSTILE
  if isinstance(value, dict):
    return {name: _hostile(item) for name, item in value.items()}
  if isinstance(value, list):
    return [_hostile(item) for item in value]
  return value


def test_everything_from_outside_is_escaped():
  findings = [
    finding._replace(
      claim=finding.claim._replace(statement=HOSTILE, source=HOSTILE, expected=HOSTILE, unit=HOSTILE), reading=HOSTILE
    )
    for finding in make_findings()
  ]
  environment = {**_hostile(make_environment()), HOSTILE: HOSTILE}
  advice = make_advice(reason=HOSTILE, critical_batch_size=(None, None, None))
  page = render(study=_hostile(make_study()), findings=findings, advice=advice, environment=environment)
  assert page.having("script") == []
  assert len(page.having("img")) == 8
  allowed = {element.tag for element in render().elements}
  assert {element.tag for element in page.elements} <= allowed
  assert not any(name.startswith("on") for element in page.elements for name in element.attributes)
  # Shown as it came, in: workload (twice), reason, why there is no critical batch size, four fields of eight claims in the table and
  # the statement once more by the figure, eight readings, and the command line; the held-fixed list and the environment come on top.
  assert page.text.count(HOSTILE) >= 4 + 8 * 5 + 8 + 1
  for name in ("dataset", "optimizer", "schedule", "batch_norm"):
    assert HOSTILE in render(study=make_study(**{name: HOSTILE})).text


def test_what_is_not_identified_says_why():
  unknown = (None, None, None)
  advice = make_advice(
    noise_scale_start=unknown, noise_scale_end=(math.nan, math.nan, math.nan), critical_batch_size=unknown
  )
  page = render(advice=advice)
  cards = [" ".join(card.text.split()) for card in page.having("div", "card")]
  assert len(cards) == 3
  for card in cards:
    assert "not identified" in card
    assert "interval" not in card.split("Why:")[0]
  assert "smaller than its own sampling error" in cards[0]
  assert "smaller than its own sampling error" in cards[1]
  (steps,) = [finding.reading for finding in make_findings() if finding.claim.id == "more_steps"]
  assert f"Why: {steps}" in cards[2]
  assert "Why:" not in " ".join(card.text for card in render().having("div", "card"))


def test_without_a_recommendation_none_is_made():
  page = render(advice=make_advice(batch_size=None, learning_rate=None, reason="Nothing reached the target."))
  assert "This study cannot recommend a batch size. Nothing reached the target." in page.text
  assert page.having("tr", "recommended") == []
  assert "Use batch size" not in page.text


def test_an_unmeasured_claim_has_no_number():
  claim = make_claim("more_steps", measured=None, ci_low=None, ci_high=None, n=None, verdict="inconclusive")
  page = render(findings=[finding._replace(claim=claim) for finding in make_findings()[:1]])
  row = " ".join(page.having("tr")[-1].text.split())
  assert "not measured slope" in row
  assert "[" not in row
  assert "None" not in page.text


def test_what_was_held_fixed():
  text = render().text
  for words in (
    "digits: 1,257 train examples, 180 validation examples, 360 test examples",
    "digits_mlp, 4,810 parameters",
    "Batch norm none",
    "Optimizer sgd, weight decay 0",  # plain SGD has no momentum, whatever its flag says
    "Schedule of the learning rate constant Target",
    "validation accuracy at least 0.95;",
    # 20 epochs of 1,257 examples: 25,140 updates at B = 1, and 25 at B = 1024, rounded up.
    "20 passes over the training set at every batch size: 25 to 25,140 updates",
    "800 updates at every batch size",
    "1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1,024",
    "1 (0) while tuning the rate, 3 (0, 1, 2) at the tuned rate",
    "204 complete, 9 diverged",
  ):
    assert words in text
  assert "running statistics" in render(study=make_study(batch_norm="running")).text
  other = make_study(optimizer="nesterov", schedule="cosine", warmup_fraction=0.05)
  assert "Optimizer nesterov, momentum 0.9, weight decay 0" in render(study=other).text
  assert "cosine, 5 % warmup; the learning rate is its peak" in render(study=other).text
  below = make_study(target={"metric": "validation_loss", "goal": 0.1, "direction": "min"})
  assert "validation loss at most 0.1;" in render(study=below).text


def _write(out_dir, **changes):
  arguments = {
    "study": make_study(),
    "findings": WRITTEN,
    "advice": make_advice(),
    "environment": make_environment(),
    "rows": make_rows(),
  }
  return write_report(out_dir, **{**arguments, **changes})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  out_dir = tmp_path_factory.mktemp("report")
  assert _write(out_dir) == out_dir / "report.html"
  return out_dir


def test_all_files_are_there_and_no_other(written):
  ids = [finding.claim.id for finding in WRITTEN]
  expected = {"report.html", "claims.json", "results.csv", "figures"}
  assert {path.name for path in written.iterdir()} == expected
  assert {path.name for path in (written / "figures").iterdir()} == {
    f"{name}.{end}" for name in ids for end in ("png", "pdf")
  }


def test_the_page_holds_the_figures_that_lie_beside_it(written):
  page = Page((written / "report.html").read_text(encoding="utf-8"))
  images = [element.attributes["src"].removeprefix("data:image/png;base64,") for element in page.having("img")]
  ids = [finding.claim.id for finding in WRITTEN]
  assert [base64.b64decode(image) for image in images] == [
    (written / "figures" / f"{name}.png").read_bytes() for name in ids
  ]


def test_claims_are_strict_json_with_the_fields_of_a_claim():
  claim = make_claim("more_steps", measured=math.nan, ci_low=-math.inf, ci_high=None, statement='σ²/B "quoted"')

  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  (read,) = json.loads(bsjax.report.page.claims_json([claim]), parse_constant=refuse)
  assert tuple(read) == Claim._fields
  assert (read["measured"], read["ci_low"], read["ci_high"]) == (None, None, None)
  assert (read["statement"], read["n"], read["verdict"]) == ('σ²/B "quoted"', 99, "holds")


def test_claims_and_results_are_what_was_given(written):
  claims = json.loads((written / "claims.json").read_text(encoding="utf-8"))
  assert [Claim(**claim) for claim in claims] == [finding.claim for finding in WRITTEN]
  with open(written / "results.csv", newline="", encoding="utf-8") as lines:
    rows = list(csv.DictReader(lines))
  assert list(rows[0]) == list(make_rows()[0])
  assert [row["batch_size"] for row in rows] == ["1", "1024"]
  # What was not measured is an empty cell, not a word.
  assert (rows[1]["steps_to_target"], rows[1]["test_accuracy"]) == ("", "")


def test_columns_are_the_union_of_all_rows():
  text = bsjax.report.page.rows_csv([{"a": 1}, {"b": 'x, "y"', "a": 2}])
  assert text == 'a,b\n1,\n2,"x, ""y"""\n'


def test_a_failure_leaves_the_old_report_whole(written, monkeypatch):
  before = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}

  def fail(**_):
    raise RuntimeError("stopped")

  monkeypatch.setattr(bsjax.report.batch_size, "render_report", fail)
  with pytest.raises(RuntimeError, match="stopped"):
    _write(written, study=make_study(workload="other"))
  assert {path: path.read_bytes() for path in written.rglob("*") if path.is_file()} == before


def test_a_study_without_records_still_gives_a_page():
  study = make_study()
  findings = judge_all(study, [])
  page = render(study=study, findings=findings, advice=advise(study, [], findings), figures={})
  assert "0 of 8 claims hold, 0 fail, 8 are inconclusive" in page.text
  assert "This study cannot recommend a batch size." in page.text


def test_the_training_set_s_noise_scale_stands_where_the_estimate_is_missing():
  advice = make_advice(noise_scale_end=(None, None, None), training_set_noise_scale_end=3141.0)
  page = render(advice=advice).text
  assert "known exactly, it is 3,140 examples" in page
  assert "known exactly" not in render(advice=advice._replace(training_set_noise_scale_end=None)).text
