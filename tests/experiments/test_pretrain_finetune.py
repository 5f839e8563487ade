"""The experiment of pre-training and fine-tuning: what it leaves, how it refuses, and that a second run computes nothing."""

import csv
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax.train.pool
from bsjax.records import read_records
from bsjax.study import run_command
from bsjax.study.pretrain_plan import MOST_STARTS
from bsjax.train import TrialConfig, init_state, restore_final
from bsjax.types import Hparams
from experiments import pretrain_finetune

CLAIMS = ["pretrain_large", "finetune_small"]
PARTS = ["pretrain", "finetune_small", "finetune_large"]
ARM = "adamw_warmup_cosine"
OPTIONS = {"smoke": True, "arms": (ARM,), "num_epochs": 8}


@pytest.fixture(scope="module", autouse=True)
def one_transfer() -> Iterator[None]:
  """Loads the task once, so that its programs are compiled once for the whole file."""
  with pytest.MonkeyPatch.context() as patch:
    cached = {name: functools.cache(make) for name, make in pretrain_finetune.TRANSFERS.items()}
    patch.setattr(pretrain_finetune, "TRANSFERS", cached)
    yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("pretrain_finetune") / "out"
  assert pretrain_finetune.run("digits", folder, **OPTIONS) == folder / "report.html"
  return folder


def test_the_smoke_run_leaves_a_whole_report(out: Path) -> None:
  claims = json.loads((out / "claims.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
  assert [claim["id"] for claim in claims] == CLAIMS
  page = (out / "report.html").read_text()
  assert page.count("data:image/png;base64,") == len(CLAIMS)
  with open(out / "results.csv", newline="") as handle:
    rows = list(csv.DictReader(handle))
  assert {row["part"] for row in rows} == {*PARTS}
  assert len(rows) == sum(len(read_records(out / "pretrain_finetune" / part)) for part in PARTS)
  study = json.loads((out / "study.json").read_text())
  assert study["counts"] == {state: sum(row["state"] == state for row in rows) for state in ("complete", "diverged")}


def test_fine_tuning_starts_from_what_its_pretraining_ended_with(out: Path) -> None:
  """At the first evaluation of fine-tuning the two starts differ; and each is named by the batch size that pre-trained it."""
  study = json.loads((out / "study.json").read_text())
  sizes = study["parts"]["pretrain"]["batch_sizes"]
  names = [study["parts"][part]["workload"] for part in PARTS[1:]]
  assert [name.rsplit("_", 1)[0] for name in names] == [
    f"digits_5to9_from_b{sizes[0]}",
    f"digits_5to9_from_b{sizes[-1]}",
  ]
  first_losses = []
  for part in PARTS[1:]:
    records = read_records(out / "pretrain_finetune" / part)
    first_losses.append(min(record.metrics[0]["validation_loss"] for record in records))
    assert {record.trial["config"]["workload"] for record in records} == {study["parts"][part]["workload"]}
  assert first_losses[0] != first_losses[1]
  assert [name.rsplit("_", 1)[1] for name in names] == [digest_of(out, study, size) for size in (sizes[0], sizes[-1])]


def digest_of(out: Path, study: dict[str, Any], size: int) -> str:
  """The digest of what the final trials of a batch size ended with, array by array, trial after trial."""
  workload = pretrain_finetune.TRANSFERS["digits"](data_dir=None, manual_dir=None, fake_data=False).pretrain
  folder, ids = out / "pretrain_finetune" / "pretrain", study["parts"]["pretrain"]["tuned"][str(size)][ARM]["final"]
  like = jax.eval_shape(functools.partial(init_state, workload, "adamw"), Hparams(0.1), jnp.uint32(0))
  configs = [TrialConfig(workload.name, size, 1, 1, optimizer="adamw", parent=name) for name in ids]
  params = [jax.tree.leaves(restore_final(folder, config, like).params) for config in configs[:MOST_STARTS]]
  return hashlib.sha256(b"".join(np.stack(arrays).tobytes() for arrays in zip(*params, strict=True))).hexdigest()[:8]


def test_noise_is_measured_half_way_at_the_smallest_batch_size_only(out: Path) -> None:
  records = read_records(out / "pretrain_finetune" / "pretrain")
  finals = [record for record in records if record.trial["kind"] == "final"]
  for record in finals:
    config = record.trial["config"]
    noise = [row["step"] for row in record.probes if row["probe"] == "noise"]
    every = config["eval_every"]
    assert noise == ([round(config["num_steps"] / 2 / every) * every] if config["batch_size"] == 8 else [])
    assert [row["step"] for row in record.probes if row["probe"] == "test"] == [config["num_steps"]]


def test_a_second_run_computes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def never(*_: object, **__: object) -> None:
    pytest.fail("something was trained again")

  monkeypatch.setattr(bsjax.train.pool, "build_segment", never)
  before = {name: (out / name).read_bytes() for name in ("claims.json", "results.csv", "report.html", "study.json")}
  pretrain_finetune.run("digits", out, **OPTIONS)
  assert {name: (out / name).read_bytes() for name in before} == before


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setattr(sys, "argv", ["pretrain_finetune", *arguments])
  code = run_command(
    pretrain_finetune._prepare_from_flags,
    documentation="",
    module=pretrain_finetune.__name__,
    flag_values=pretrain_finetune._FLAGS,
  )
  pretrain_finetune._FLAGS.unparse_flags()
  assert code == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--batch_sizes=8", "--batch_sizes=8, wanted at least two, to compare small with large ones"),
    ("--finetune_batch_sizes=4", "--finetune_batch_sizes=4, wanted at least two"),
    ("--batch_sizes=8,600", "--batch_sizes has 600, wanted more than 8"),
    ("--batch_sizes=8,x", "--batch_sizes=8,x, wanted whole numbers, such as 16,64, separated by commas"),
    ("--arms=lars", "--arms=lars, wanted some of momentum_constant"),
    ("--finetune_epochs=0.1", "--num_epochs=0.1 is less than 2 steps at batch size 256"),
    ("--num_trials=0", "--num_trials=0, wanted 4 to 500"),
    ("--final_seeds=1", "--final_seeds=1, wanted 2"),
    ("--task=mnits", "mnits"),
    ("--workload=digits_mlp", "workload"),
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
  assert message in refused([f"--out={out}", argument], capsys, monkeypatch)
  assert not out.exists()


def test_an_unknown_task_is_refused_from_python_too(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="--task='mnits' is unknown: use one of digits, mnist, shakespeare"):
    pretrain_finetune.run("mnits", tmp_path / "out")
