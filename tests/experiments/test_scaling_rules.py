"""`python -m experiments.scaling_rules`: what it leaves, how it refuses, and that an interruption changes nothing."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bsjax.optim import scale_adam
from bsjax.records import read_records
from bsjax.study import run_command
from bsjax.train import PLANS, Plan
from bsjax.types import Hparams
from bsjax.workloads import load_workload
from experiments import scaling_rules as experiment

FIGURES = ("no_rule_fits_all", "scaling_lattice", "scaling_reference")
OPTIONS = {"batch_sizes": (64, 256), "optimizers": ("sgd", "adam"), "seeds": 4, "smoke": True}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("scaling") / "out"
  assert experiment.run("digits_mlp", folder, **OPTIONS) == folder / "report.html"
  return folder


def of_kind(out: Path, kind: str) -> list:
  return [record for record in read_records(out / "scaling_rules") if record.trial["kind"] == kind]


def test_the_run_leaves_a_whole_report(out: Path) -> None:
  (claim,) = json.loads((out / "claims.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
  assert claim["id"] == "no_rule_fits_all"
  assert claim["ci_low"] <= claim["measured"] <= claim["ci_high"]
  page = (out / "report.html").read_text()
  assert page.count("data:image/png;base64,") == len(FIGURES)
  for name in FIGURES:
    assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
  assert len((out / "results.csv").read_text().splitlines()) == 1 + len(read_records(out / "scaling_rules"))


def test_rates_are_common_to_all_batch_sizes_and_looks_are_fine_enough(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  for optimizer, lattices in study["lattices"].items():
    assert list(lattices) == ["64", "256"]
    for entry in lattices.values():
      assert (entry["reason"], entry["open"]) == ("", [])
      best = 2 * math.log2(entry["best_learning_rate"] / study["base_rates"][optimizer])
      assert entry["first"] < best < entry["last"]
      assert entry["eval_every"] == 1 or entry["eval_every"] <= study["quantisation"] * entry["fewest_steps"]
    rates = {
      r.trial["hparams"]["learning_rate"]
      for r in of_kind(out, "lattice")
      if r.trial["config"]["optimizer"] == optimizer
    }
    base = study["base_rates"][optimizer]
    first, last = min(e["first"] for e in lattices.values()), max(e["last"] for e in lattices.values())
    assert rates <= {base * 2 ** (k / 2) for k in range(first, last + 1)}


def test_noise_is_measured_along_the_best_rate(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  trials = of_kind(out, "lattice_noise")
  assert len(trials) == 4
  assert {plan_of(record) for record in trials} == {Plan()}  # each alone: lanes beside it would stay empty
  assert Plan() not in {plan_of(record) for record in of_kind(out, "lattice")}
  for record in trials:
    config = record.trial["config"]
    entry = study["lattices"][config["optimizer"]][str(config["batch_size"])]
    assert record.trial["hparams"]["learning_rate"] == entry["best_learning_rate"]
    assert entry["fewest_steps"] <= config["num_steps"] < entry["fewest_steps"] + config["eval_every"] + 1
    rows = [row for row in record.probes if row["group"] == "all"]
    assert [row["step"] for row in rows] == config["probe_steps"]
    assert sum(row["noise_scale"] is not None for row in rows) >= 3


def test_adams_rule_carries_all_of_its_hyperparameters(out: Path) -> None:
  study = json.loads((out / "study.json").read_text())
  assert study["reference_batch_size"] == 64
  rate = study["lattices"]["adam"]["64"]["best_learning_rate"]
  expected = scale_adam(Hparams(rate, epsilon=1e-8), batch_size=256, reference_batch_size=64)
  trials = of_kind(out, "adam_sqrt")
  assert sorted(r.trial["seed"] for r in trials) == [0, 1, 2, 3]
  for record in trials:
    assert record.trial["config"]["batch_size"] == 256
    assert record.trial["hparams"] == {
      "learning_rate": expected.learning_rate,
      "momentum": expected.momentum,
      "beta2": expected.beta2,
      "weight_decay": 0.0,
      "epsilon": expected.epsilon,
    }
  assert study["adam_sqrt_skipped"] == {}


def plan_of(record) -> Plan:
  return Plan(*(record.trial["plan"][name] for name in Plan._fields))


def contents(out: Path) -> dict[str, bytes]:
  files = [*out.glob("scaling_rules/*/*.json*"), out / "study.json", out / "claims.json", out / "results.csv"]
  return {str(path.relative_to(out)): path.read_bytes() for path in sorted(files) if path.name != "status.json"}


def test_an_interrupted_study_ends_with_the_same_bytes(out: Path, tmp_path: Path) -> None:
  shutil.copytree(out, tmp_path / "again")
  for path in sorted((tmp_path / "again" / "scaling_rules").glob("*/"))[::3]:
    shutil.rmtree(path)
  (tmp_path / "again" / "study.json").unlink()
  left = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("scaling_rules/*/*.json*")}
  experiment.run("digits_mlp", tmp_path / "again", **OPTIONS)
  found, whole = contents(tmp_path / "again"), contents(out)
  assert found.keys() == whole.keys()
  changed = {name for name in found if found[name] != whole[name] and not name.endswith("trial.json")}
  assert changed == set()  # trial.json names the command line, too
  assert {path: path.stat().st_mtime_ns for path in left} == left


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setattr(sys, "argv", ["scaling_rules", *arguments])
  code = run_command(
    experiment._prepare_from_flags, documentation="", module=experiment.__name__, flag_values=experiment._FLAGS
  )
  experiment._FLAGS.unparse_flags()
  assert code == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--batch_sizes=8", "--batch_sizes has 1, wanted at least 2"),
    ("--batch_sizes=8,1000", "--batch_sizes has 1000, wanted 1 to 512"),
    ("--batch_sizes=0,8", "--batch_sizes has 0, wanted 1 to 512"),
    ("--batch_sizes=8,x", "--batch_sizes=8,x, wanted whole numbers"),
    ("--optimizers=sgd,sgdd", "--optimizers has 'sgdd', wanted each once of sgd, momentum"),
    ("--optimizers=sgd,sgd", "--optimizers has 'sgd', wanted each once"),
    ("--seeds=3", "--seeds=3, wanted 4 to 50"),
    ("--seeds=51", "--seeds=51, wanted 4 to 50"),
    ("--plan=fast", "--plan=fast"),
    ("--reference_batch_size=3", "--reference_batch_size=3, wanted one of the batch sizes 1, 2, 4"),
    ("--momentum=1 --optimizers=momentum", "--momentum=1, wanted 0 <= momentum < 1"),
    ("--trial_devices=9", "mesh of trial=9"),
    ("--num_steps=0", "--num_steps=0, wanted at least 1"),
    ("--num_epochs=nan", "--num_epochs=nan, wanted a finite number above 0"),
    ("--no_such_flag=1", "no_such_flag"),
  ],
)
def test_bad_flag_is_one_line_and_touches_nothing(
  argument: str,
  message: str,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  out = tmp_path / "out"
  assert message in refused(["--workload=quadratic", f"--out={out}", *argument.split()], capsys, monkeypatch)
  assert not out.exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_sizes": (64, 8, 64)}, "--batch_sizes=8,64,64, wanted each once"),
    ({"optimizers": ()}, "--optimizers is empty"),
    ({"plan": "fast"}, "--plan=fast, wanted one of auto"),
  ],
)
def test_nonsense_from_python_is_refused_before_anything_is_made(options, message, tmp_path: Path) -> None:
  with pytest.raises(ValueError, match=message):
    experiment.prepare("quadratic", tmp_path / "out", **{"batch_sizes": (8, 64)} | options)
  assert not (tmp_path / "out").exists()


def test_batches_that_the_devices_cannot_share_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(experiment, "make_mesh", lambda trial: SimpleNamespace(shape={"data": 4}))
  with pytest.raises(ValueError, match="--batch_sizes has 2, which 4 devices cannot share equally"):
    experiment.prepare("quadratic", tmp_path / "out", batch_sizes=(2, 64))
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("sizes", "few"), [((4, 16), (4, 16)), ((4, 16, 64), (4, 16, 64)), ((1, 2, 4, 8), (2, 8))])
def test_a_smoke_run_has_batch_sizes_to_carry_between(
  sizes, few, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Two at least, whatever the workload's; the plan that is claimed is the one that is run."""
  quadratic = load_workload("quadratic")
  preset = quadratic.preset._replace(batch_sizes=sizes)
  monkeypatch.setattr(experiment, "load_workload", lambda *_, **__: dataclasses.replace(quadratic, preset=preset))
  claimed = {}
  monkeypatch.setattr(experiment, "claim_folder", lambda out, settings, study: claimed.update(settings))
  experiment.prepare("quadratic", tmp_path, smoke=True)
  assert (claimed["batch_sizes"], claimed["optimizers"], claimed["seeds"]) == (few, ("sgd", "adam"), 4)


def test_help_fits_one_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sys, "argv", ["scaling_rules", "--help"])
  code = run_command(
    experiment._prepare_from_flags,
    documentation=experiment.__doc__,
    module=experiment.__name__,
    flag_values=experiment._FLAGS,
  )
  text = capsys.readouterr().out
  assert code == 0
  assert len(text.splitlines()) <= 50
  for name in (
    "batch_sizes",
    "optimizers",
    "seeds",
    "reference_batch_size",
    "num_epochs",
    "num_steps",
    "plan",
    "smoke",
  ):
    assert f"--{name}:" in text


def test_every_flag_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
  given = {
    "batch_sizes": (4, 8),
    "optimizers": ("adam", "sgd"),
    "seeds": 5,
    "reference_batch_size": 8,
    "momentum": 0.5,
    "num_epochs": 3.0,
    "num_steps": 7,
    "plan": "map",
    "workload": "quadratic",
    "smoke": True,
  }
  words = [f"--{name}={','.join(map(str, x)) if isinstance(x, tuple) else x}" for name, x in given.items()]
  monkeypatch.setattr(experiment, "prepare", lambda **options: options)
  experiment._FLAGS(["scaling_rules", *words])
  options = experiment._prepare_from_flags()
  experiment._FLAGS.unparse_flags()
  assert {name: options[name] for name in given} == given


def test_another_studys_folder_is_refused(out: Path) -> None:
  before = contents(out)
  with pytest.raises(ValueError, match="was started with other settings"):
    experiment.run("digits_mlp", out, **OPTIONS | {"seeds": 5})
  assert contents(out) == before


def test_a_target_out_of_reach_leaves_a_report(tmp_path: Path) -> None:
  """And its trials take turns as `plan` says."""
  path = experiment.run(
    "digits_mlp",
    tmp_path,
    batch_sizes=(256, 64),
    optimizers=("sgd",),
    seeds=4,
    num_steps=2,
    num_epochs=0.01,
    plan="sequential",
  )
  assert json.loads((tmp_path / "study.json").read_text())["batch_sizes"] == [64, 256]
  assert {plan_of(record) for record in read_records(tmp_path / "scaling_rules")} == {PLANS["sequential"]}
  (claim,) = json.loads((tmp_path / "claims.json").read_text())
  assert (claim["verdict"], claim["measured"]) == ("inconclusive", None)
  assert "not reached: the nearest validation_accuracy is 0." in path.read_text()
