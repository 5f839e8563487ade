"""What the page of the scaling rules says: its answer, its tables, and what was held fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsjax.analysis import Finding
from bsjax.analysis.claims_scaling import ADAM_RULE, NEAR_FACTOR
from bsjax.analysis.regret import EXPONENTS, RULES
from bsjax.report.experiment import Page, Table
from bsjax.report.numbers import format_number
from bsjax.report.page import split_sizes

RATIOS_IN_A_TABLE = 10


def scaling_page(study: Mapping[str, Any], findings: Sequence[Finding]) -> Page:
  """Compose the page from the study's summary and its one finding."""
  (finding,) = findings
  series = finding.series
  tables = (
    _summary_table(study, series),
    _worst_table(series),
    _ratio_table(series),
    _reference_table(study, series),
    _rates_table(series),
    _slope_table(series),
    _left_out_table(series),
  )
  return Page(
    title=f"Scaling rules: {study['workload']}",
    question=f"Which rule for the learning rate loses least when the batch size of {study['workload']} changes?",
    lead=f"{study['workload']} has {study['num_params']:,} parameters and was trained on {study['train_size']:,} examples of "
    f"{study['dataset']}, until {study['target']['metric'].replace('_', ' ')} reached {study['target']['goal']:g}, at every rate "
    "of a lattice around the best one. The best rate of each batch size was then carried to every other by each rule.",
    answer=_answer(finding),
    tables=[table for table in tables if table.rows],
    fixed=_held_fixed(study),
  )


def _rows(series: Mapping[str, np.ndarray], prefix: str, names: str) -> list[tuple]:
  """Return the rows of the series whose names begin alike."""
  return list(zip(*(series[prefix + name].tolist() for name in names.split()), strict=True))


def _answer(finding: Finding) -> str:
  """Say for each optimizer which rule costs least on average, upwards and overall, and that it is open where nothing was measured."""
  cost: dict[str, dict[str, float]] = {}
  for optimizer, rule, selection, regret in _rows(finding.series, "summary_", "optimizer rule selection regret"):
    if selection == "up" and np.isfinite(regret):
      cost.setdefault(optimizer, {})[rule] = regret
  if not cost:
    return finding.reading
  clauses = []
  for optimizer, rules in cost.items():
    first, *others = sorted(rules, key=rules.__getitem__)
    clauses.append(
      f"with {optimizer} the rule {first} ({format_number(rules[first])} times the steps of the best rate"
      + (f", against {', '.join(f'{rule} {format_number(rules[rule])}' for rule in others)}" if others else "")
      + ")"
    )
  outcome = {
    "holds": "No rule fits everywhere: each loses more than a fifth of the steps at its worst pair of batch sizes.",
    "fails": "One rule loses less than a fifth of the steps at every pair of batch sizes.",
    "inconclusive": "Whether some rule fits everywhere is left open.",
  }[finding.claim.verdict]
  return f"From smaller to larger batches, what loses least on average is {'; '.join(clauses)}. {outcome}"


def _summary_table(study: Mapping[str, Any], series: Mapping[str, np.ndarray]) -> Table:
  """Show the mean regret of each rule over different choices of pairs, and how far off the lattice its rates lie."""
  offsets = {(optimizer, rule): offset for optimizer, rule, offset in _rows(series, "offset_", "optimizer rule factor")}
  cells: dict[tuple[str, str], dict[str, tuple]] = {}
  for optimizer, rule, selection, *interval, pairs in _rows(
    series, "summary_", "optimizer rule selection regret low high pairs"
  ):
    cells.setdefault((optimizer, rule), {})[selection] = (tuple(interval), pairs)
  rows = [
    (
      optimizer,
      rule,
      *(found[name][0] for name in ("all", "up", "down", "near", "from_smallest", "from_largest")),
      found["all"][1],
      offsets[optimizer, rule],
    )
    for (optimizer, rule), found in cells.items()
  ]
  return Table(
    f"Steps at the carried rate over steps at the best rate: geometric means with 95 % intervals. {study['give_up_factor']:g} is the "
    "most there can be, and stands for at least that. The last column: how far off the "
    "lattice carried rates lay at most, as a factor; the nearest rate was taken.",
    (
      "Optimizer",
      "Rule",
      "All pairs",
      "To larger batches",
      "To smaller batches",
      f"At most {NEAR_FACTOR:g}-fold change",
      "From the smallest",
      "From the largest",
      "Pairs",
      "Off the lattice",
    ),
    rows,
  )


def _worst_table(series: Mapping[str, np.ndarray]) -> Table:
  rows = [
    (optimizer or "all together", rule, b0, b, tuple(interval))
    for optimizer, rule, b0, b, *interval in _rows(series, "worst_", "optimizer rule from to regret low high")
  ]
  return Table(
    "The worst pair upwards. The number was judged on seeds that did not choose the pair, so it does not owe its size to that choice; "
    "the pair named is the one that is worst over all seeds.",
    ("Optimizer", "Rule", "From batch size", "To batch size", "Steps / steps at the best rate"),
    rows,
  )


def _ratio_table(series: Mapping[str, np.ndarray]) -> Table:
  """Show the regret by the ratio of the batch sizes, upwards, where there are few enough ratios for a table."""
  cells: dict[tuple[str, str], dict[float, tuple]] = {}
  for optimizer, rule, factor, *interval in _rows(series, "curve_", "optimizer rule factor regret low high"):
    if factor > 1:
      cells.setdefault((optimizer, rule), {})[factor] = tuple(interval)
  ratios = sorted({factor for found in cells.values() for factor in found})
  rows = [(optimizer, rule, *(found.get(ratio) for ratio in ratios)) for (optimizer, rule), found in cells.items()]
  return Table(
    "The same by the ratio of the new batch size to the old one, upwards.",
    ("Optimizer", "Rule", *(f"× {ratio:g}" for ratio in ratios)),
    rows if len(ratios) <= RATIOS_IN_A_TABLE else [],
  )


def _reference_table(study: Mapping[str, Any], series: Mapping[str, np.ndarray]) -> Table:
  """Compare the rules from the reference batch size, Adam's own among them."""
  cells: dict[tuple[str, str], dict[int, tuple]] = {}
  for optimizer, rule, size, *interval in _rows(series, "reference_", "optimizer rule batch_size regret low high"):
    cells.setdefault((optimizer, rule), {})[size] = tuple(interval)
  sizes = sorted({size for found in cells.values() for size in found} - {study["reference_batch_size"]})
  skipped = ", ".join(sorted(study["adam_sqrt_skipped"], key=int))
  return Table(
    f"From batch size {study['reference_batch_size']} alone. {ADAM_RULE} scales Adam's betas and epsilon as well as the rate (Malladi "
    "et al., 2022)"
    + (f"; it has no meaning, or nothing to compare with, at batch sizes {skipped}." if skipped else "."),
    ("Optimizer", "Rule", *(f"To B = {size:,}" for size in sizes)),
    [(optimizer, rule, *(found.get(size) for size in sizes)) for (optimizer, rule), found in cells.items()],
  )


def _rates_table(series: Mapping[str, np.ndarray]) -> Table:
  return Table(
    "The best rate of each batch size, refined between neighbours of the lattice; the mean steps at the best rate of the lattice; and the "
    "noise scale tr(Sigma)/|G|^2 along one trial at that rate, in examples, geometric mean.",
    ("Optimizer", "Batch size", "Best rate", "Steps to target", "Noise scale"),
    _rows(series, "best_", "optimizer batch_size rate steps noise_scale"),
  )


def _slope_table(series: Mapping[str, np.ndarray]) -> Table:
  exponents = ", ".join(f"{rule} {exponent:g}" for rule, exponent in EXPONENTS.items())
  return Table(
    "The exponent of the best rate against batch size: slope in log-log, its interval from the scatter about the line. The rules': "
    f"{exponents}.",
    ("Optimizer", "Exponent"),
    [(optimizer, tuple(interval)) for optimizer, *interval in _rows(series, "slope", "_optimizer _value _low _high")],
  )


def _left_out_table(series: Mapping[str, np.ndarray]) -> Table:
  return Table(
    "Batch sizes that are left out.",
    ("Optimizer", "Batch size", "Why"),
    _rows(series, "left_", "optimizer batch_size reason"),
  )


def _held_fixed(study: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return what was the same in every trial, as names and sentences."""
  counts = study["counts"]
  target = study["target"]
  return [
    ("Data", f"{study['dataset']}: {split_sizes(study)}"),
    ("Model", f"{study['workload']}, {study['num_params']:,} parameters"),
    (
      "Target",
      f"{target['metric'].replace('_', ' ')} {'at least' if target['direction'] == 'max' else 'at most'} {target['goal']:g}",
    ),
    (
      "Optimizers",
      f"{', '.join(study['optimizers'])}; momentum {study['momentum']:g} (also beta1), constant rate, no weight decay",
    ),
    (
      "Learning rates",
      "; ".join(f"{optimizer}: {rate:.3g} × 2^(k/2)" for optimizer, rate in study["base_rates"].items())
      + ", k whole, the same for all batch sizes; from the best rate on, until a rate fails at every seed on either side",
    ),
    (
      "Failure",
      f"diverged, or more than {study['give_up_factor']:g} times the mean steps of the best rate: trials are cut there",
    ),
    ("Looks for the target", f"every step, or every {100 * study['quantisation']:g} % of the steps to it or oftener"),
    (
      "Seeds",
      f"{len(study['seeds'])} ({', '.join(map(str, study['seeds']))}); rates are chosen on all but one and judged on it, in turn",
    ),
    ("Rules", f"{', '.join(RULES)}; the noise scale is measured at the batch size that a rate is carried from"),
    ("Trials", f"{counts['complete']:,} complete, {counts['diverged']:,} diverged"),
  ]
