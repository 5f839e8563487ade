"""`python -m experiments.steps_to_result`: end to end on real data, continued after a kill, refused where it makes no sense."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bsjax.records import read_records
from experiments import steps_to_result as experiment

CLAIMS = ("three_regimes", "momentum_extends_scaling", "lr_sensitivity", "same_best_error")
OPTIONS = {
  "smoke": True,
  "batch_sizes": (64, 128),
  "optimizers": ("sgd", "momentum"),
  "num_trials": 6,
  "num_steps": 160,
  "num_epochs": 2.0,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("steps") / "run"
  assert experiment.run("digits_mlp", folder, **OPTIONS) == folder / "report.html"
  return folder


def test_a_run_judges_its_claims_and_writes_what_it_promises(out):
  claims = json.loads((out / "claims.json").read_text())
  assert [claim["id"] for claim in claims] == list(CLAIMS)
  page = (out / "report.html").read_text()
  assert "How many steps does digits_mlp need at each batch size?" in page
  assert page.count("data:image/png;base64,") == len(CLAIMS) + 2
  study = json.loads((out / "study.json").read_text())
  assert list(study["optimizers"]) == ["sgd", "momentum"]
  rows = (out / "results.csv").read_text().splitlines()
  kinds = [r.trial["kind"] for name in ("sgd", "momentum") for r in read_records(out / "steps_to_result" / name)]
  assert kinds.count("timing") == 4  # two batch sizes, two optimizers
  assert len(rows) == 1 + len(kinds) - 4


def test_quality_uses_the_whole_budget_at_points_that_reached_the_target(out):
  study = json.loads((out / "study.json").read_text())["optimizers"]["momentum"]
  records = read_records(out / "steps_to_result" / "momentum")
  by_kind = {}
  for record in records:
    by_kind.setdefault((record.trial["kind"], record.trial["config"]["batch_size"]), []).append(record)
  for size in (64, 128):
    swept = {r.trial["seed"]: r for r in by_kind["sweep", size]}
    quality = by_kind["quality", size]
    assert 1 <= len(quality) <= 2
    for record in quality:
      assert record.trial["hparams"] == swept[record.trial["seed"]].trial["hparams"]
      assert record.metrics[-1]["step"] >= study["sweep"][str(size)]["num_steps"] >= 160
      assert max(r["validation_accuracy"] for r in swept[record.trial["seed"]].metrics) >= 0.95
    final = by_kind["quality_final", size]
    assert sorted(r.trial["seed"] for r in final) == [1000, 1001]
    best = max(quality, key=lambda r: (max(row["validation_accuracy"] for row in r.metrics), -quality.index(r)))
    assert all(r.trial["hparams"]["learning_rate"] == best.trial["hparams"]["learning_rate"] for r in final)


def test_a_run_continues_where_it_was_killed(out, tmp_path):
  again = tmp_path / "run"
  shutil.copytree(out, again)
  for path in sorted((again / "steps_to_result" / "sgd").glob("*/"))[::3]:
    shutil.rmtree(path)
  experiment.run("digits_mlp", again, **OPTIONS)
  for name in ("claims.json", "study.json", "results.csv"):
    assert (again / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"optimizers": ()}, "--optimizers=, wanted at least one"),
    ({"optimizers": ("sgd", "sgd")}, "each once"),
    ({"optimizers": ("sdg",)}, "--optimizer=sdg, wanted one of sgd"),
    ({"quality_trials": -1}, "--quality_trials=-1, wanted 0 or more"),
    ({"num_trials": 0}, "--num_trials=0, wanted 1"),
    ({"batch_sizes": (2000,)}, "--batch_sizes has 2000, wanted 1 to 1024"),
    ({"space": "learning_rate:log:1:0.1"}, "the lower one first"),
    ({"space": "learning_rate:log:0:0.1"}, "a log scale cannot reach 0"),
    ({"scaling_rule": "noise"}, "--noise_scale=0: wanted a number of examples"),
    ({"noise_scale": 100.0}, "none for others"),
    ({"validation_examples": 400}, "--validation_examples=400, wanted 1 to 386"),
    ({"plan": "fast"}, "--plan=fast, wanted one of auto"),
  ],
)
def test_nonsense_is_refused_before_anything_is_made(options, words, tmp_path):
  with pytest.raises(ValueError, match=words.replace("(", r"\(")):
    experiment.prepare("digits_mlp", tmp_path / "out", **OPTIONS | options)
  assert not (tmp_path / "out").exists()


def test_a_folder_of_another_sweep_is_refused_and_kept(out):
  before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
  with pytest.raises(ValueError, match="num_trials"):
    experiment.prepare("digits_mlp", out, **OPTIONS | {"num_trials": 7})
  assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_command_answers_in_one_line(tmp_path):
  command = [sys.executable, "-m", "experiments.steps_to_result", f"--out={tmp_path / 'out'}"]
  found = subprocess.run([*command, "--batch_sizes=0"], capture_output=True, text=True, check=False)
  assert found.returncode == 2
  assert found.stderr == "error: --batch_sizes has 0, wanted 1 to 1024, the size of the training set\n"
  helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
  assert len(helped.splitlines()) <= 50
  assert all(f"--{name}" in helped for name in ("optimizers", "space", "num_trials", "quality_trials"))
