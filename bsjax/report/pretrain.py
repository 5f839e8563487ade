"""What the page of the study of pre-training and fine-tuning says: its answer, its tables, and what was held fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bsjax.analysis import Finding
from bsjax.analysis.claims_pretrain import PRETRAIN
from bsjax.analysis.large_batch import error_metric
from bsjax.records import Record
from bsjax.report.experiment import Page, Table
from bsjax.report.large_batch import quantity, tuned_row
from bsjax.report.page import split_sizes

ANSWERS = {"holds": "yes", "fails": "no", "inconclusive": "left open"}


def pretrain_page(
  study: Mapping[str, Any], records: Mapping[str, Sequence[Record]], findings: Sequence[Finding]
) -> Page:
  """Compose the page from the study's summary, the records of each part, and its findings."""
  parts = study["parts"]
  first = parts[PRETRAIN]
  finetuned = [part for name, part in parts.items() if name != PRETRAIN]
  tasks = f"{first['workload']}, then {_second_task(finetuned)}" if finetuned else first["workload"]
  pretrain_large, finetune_small = (ANSWERS[finding.claim.verdict] for finding in findings)
  return Page(
    title=f"Pre-training and fine-tuning: {first['workload']}",
    question=f"Which batch size to pre-train with, and which to fine-tune with: {tasks}?",
    lead=f"A network of {first['num_params']:,} parameters was pre-trained on {first['train_size']:,} examples for {first['num_epochs']:g} "
    f"epochs at every batch size, each way to train tuned with {first['num_trials']} trials and judged at {len(first['final_seeds'])} "
    "fresh seeds. What the smallest and the largest batch size pre-trained was fine-tuned in the same manner.",
    answer=f"Up to the critical batch size, does pre-training lose nothing with large batches: {pretrain_large}. Do small batches "
    f"fine-tune better: {finetune_small}.",
    tables=[_table(name, part, records[name], study["starts"]) for name, part in parts.items()],
    fixed=_held_fixed(study),
  )


def _second_task(finetuned: Sequence[Mapping[str, Any]]) -> str:
  return finetuned[0]["workload"].split("_from_")[0]


def _table(name: str, part: Mapping[str, Any], records: Sequence[Record], starts: int) -> Table:
  finals = {record.id: record for record in records if record.trial.get("kind") == "final"}
  metric = "test_loss" if name == PRETRAIN else error_metric(finals.values())
  what = (
    "Pre-training" if name == PRETRAIN else f"Fine-tuning what batch size {part['pretrain_batch_size']:,} pre-trained"
  )
  shared = "" if name == PRETRAIN else f", which share at most {starts} pre-trained networks"
  return Table(
    f"{what}, {part['num_epochs']:g} epochs at every batch size: means over {len(part['final_seeds'])} fresh seeds{shared}, with the 95 % "
    "interval. A rate with a mark sits on the edge of its space, which was widened as often as allowed. Steps to target: the median over "
    "the seeds, and how many arrived. Trials: of the search, with those of wider spaces; how many of them diverged.",
    ("Batch size", "Arm", "Rate", "Warm-up", quantity(metric), "Validation loss", "Steps to target", "Trials"),
    [tuned_row(part, finals, size, arm, metric) for size in part["batch_sizes"] for arm in part["arms"]],
  )


def _held_fixed(study: Mapping[str, Any]) -> list[tuple[str, str]]:
  parts, counts, (points, seeds) = study["parts"], study["counts"], study["repeats"]
  first = parts[PRETRAIN]
  arms = [arm for part in parts.values() for arm in part["arms"].values()]
  decays = {arm["optimizer"]: arm["weight_decay"] for arm in arms}
  finetuned = [part for name, part in parts.items() if name != PRETRAIN]
  return [
    ("Data, pre-training", f"{first['dataset']}: {split_sizes(first)}"),
    *[("Data, fine-tuning", f"{part['dataset']}: {split_sizes(part)}") for part in finetuned[:1]],
    ("Beta1", f"{study['momentum']:g}; beta2 is 0.999"),
    ("Weight decay", "; ".join(f"{decay:g} for {name}" for name, decay in decays.items())),
    (
      "Tuning",
      f"quasi-random trials over the rate and the length of the warm-up; a quarter more for a wider space, as often as one of the best "
      f"rates sits on an edge, at most 3 times; then the best {points} points at {seeds} fresh seeds each. The point with the lowest mean "
      "validation loss at the end of the budget wins.",
    ),
    ("Starts", f"each fine-tuning seed draws one of {study['starts']} pre-trained networks; {_head(study)}"),
    ("Trials", f"{counts['complete']:,} complete, {counts['diverged']:,} diverged"),
  ]


def _head(study: Mapping[str, Any]) -> str:
  return f"the head ({', '.join(study['head'])}) starts anew" if study["head"] else "every parameter is kept"
