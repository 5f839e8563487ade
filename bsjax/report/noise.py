"""What the page of the study of gradient noise says: its answer, its two tables, and what was held fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsjax.analysis import Finding
from bsjax.report.experiment import Page, Table
from bsjax.report.numbers import format_number
from bsjax.report.page import split_sizes


def noise_page(study: Mapping[str, Any], findings: Sequence[Finding]) -> Page:
  """Compose the page from the study's summary and its findings."""
  by_id = {finding.claim.id: finding for finding in findings}
  growth, temperature = by_id["noise_grows"], by_id["temperature"]
  return Page(
    title=f"Gradient noise: {study['workload']}",
    question=f"How large is the gradient noise of {study['workload']}, and does it behave as theory says?",
    lead=f"{study['workload']} has {study['num_params']:,} parameters and was trained on {study['train_size']:,} examples of "
    f"{study['dataset']}. Along the way its gradient noise was measured, exactly over the training set, each number with "
    "its interval or with the statement that so many examples cannot tell it.",
    answer=_answer(growth),
    tables=[table for table in (_settings_table(growth), _temperature_table(study, temperature)) if table.rows],
    fixed=_held_fixed(study),
  )


def _answer(growth: Finding) -> str:
  start, end = (np.asarray(growth.series[name], float) for name in ("start", "end"))
  if not np.isfinite(start).any() or not np.isfinite(end).any():
    return "The noise scale could not be measured at the start and the end of any trial."
  return (
    f"The noise scale {growth.series['quantity']} is {_range(start)} examples at the first step and {_range(end)} at the end of training. "
    "A batch well below it wastes no example, a batch well above it wastes most of them."
  )


def _range(values: np.ndarray) -> str:
  """Write one number, or `12.0 to 45.0`, over the settings."""
  values = values[np.isfinite(values)]
  low, high = format_number(float(values.min())), format_number(float(values.max()))
  return low if low == high else f"{low} to {high}"


def _settings_table(growth: Finding) -> Table:
  names = [
    "setting_batch_size",
    "setting_learning_rate",
    "setting_seeds",
    "start",
    "end",
    "factor",
    "factor_low",
    "factor_high",
  ]
  columns = [np.asarray(growth.series[name]).tolist() for name in names]
  return Table(
    f"The noise scale {growth.series['quantity']} in examples, geometric mean over seeds: at the first step, and over the checkpoints "
    "in the last quarter of training.",
    ("Batch size", "Learning rate", "Seeds", "Noise scale at the start", "at the end", "End / start, 95 % interval"),
    [
      (int(size), rate, int(seeds), start, end, ratio)
      for size, rate, seeds, start, end, *ratio in zip(*columns, strict=True)
    ],
  )


def _temperature_table(study: Mapping[str, Any], temperature: Finding) -> Table:
  names = ["factor_branch", "predicted", "factor", "factor_low", "factor_high", "after", "after_low", "after_high"]
  columns = [np.asarray(temperature.series[name]).tolist() for name in names]
  branches = {branch["name"]: branch for branch in study["branches"]}
  return Table(
    "The temperature test: the noise scale of the training set over that of the run that was not changed, in the second half of the "
    "change and in the second half of the stretch after it was undone, with 95 % intervals over seeds.",
    ("Change", "Batch size", "Learning rate", "Predicted", "Measured", "After the return"),
    [
      (name, branches[name]["batch_size"], branches[name]["learning_rate"], predicted, rest[:3], rest[3:])
      for name, predicted, *rest in zip(*columns, strict=True)
    ],
  )


def _held_fixed(study: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return what was the same in every trial, as names and sentences."""
  momentum = "" if study["optimizer"] == "sgd" else f", momentum {study['momentum']:g}"
  rates = "; ".join(
    f"batch size {size}: {', '.join(f'{rate:.3g}' for rate in rates)}"
    for size, rates in study["learning_rates"].items()
  )
  counts = study["counts"]
  facts = [
    ("Data", f"{study['dataset']}: {split_sizes(study)}"),
    ("Model", f"{study['workload']}, {study['num_params']:,} parameters"),
    ("Batch norm", "none" if study["batch_norm"] == "none" else f"{study['batch_norm']} statistics"),
    ("Optimizer", f"{study['optimizer']}{momentum}, no weight decay, constant rate"),
    ("Learning rates", rates),
    ("Length", f"{study['num_epochs']:g} passes over the training set, in each stretch of the temperature test too"),
    ("Seeds", f"{len(study['seeds'])} ({', '.join(map(str, study['seeds']))})"),
  ]
  if study["branches"]:
    base = study["branches"][0]
    facts.append(
      (
        "Temperature test",
        f"from batch size {base['batch_size']} and rate {base['learning_rate']:.3g}, and back to them; batches drawn with replacement",
      )
    )
  else:
    facts.append(("Temperature test", "not made: the training set is too small for a fourfold batch"))
  return [
    *facts,
    (
      "Trials",
      f"{counts['complete']:,} complete, {counts['diverged']:,} diverged (a diverged trial enters no claim)",
    ),
  ]
