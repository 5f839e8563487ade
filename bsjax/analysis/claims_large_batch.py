"""The judges of large batches: do warm-up, a cosine, and LARS or LAMB help there, each arm tuned equally?"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bsjax.analysis.claim import Claim, Finding, Verdict, columns, in_words, judged, positive, unjudged
from bsjax.analysis.fits import UNKNOWN, Interval
from bsjax.analysis.large_batch import (
  NAMES,
  RECIPES,
  Outcome,
  better_arm,
  entry_of,
  error_metric,
  final_trials,
  paired_difference,
  read_outcome,
)
from bsjax.analysis.selection import batch_size, is_number, last_metric
from bsjax.records import Record

LEAST_SHARE = 1 / 10
"""The least difference worth a claim's name is this part of the baseline's error, and at least one example of the test set."""
LAYERWISE = ("lars_warmup_cosine", "lamb_warmup_cosine")
PLAIN = ("momentum_warmup_cosine", "adamw_warmup_cosine")
"""Optimizers with a rate of their own for each layer, and those without, under one schedule."""
WARMUP_NEEDED = unjudged(
  "warmup_needed",
  statement="Large batches need a gradual warm-up of the learning rate: without one, momentum at a constant rate ends with a larger test "
  "error at the largest batch size, each tuned",
  source="Goyal et al. (2017), section 2.2 and Table 1",
  expected="above 0",
  unit="without minus with warm-up",
)
COSINE_HELPS = unjudged(
  "cosine_helps",
  statement="A cosine decay of the learning rate helps at the largest batch size: momentum with warm-up ends with a smaller test error "
  "than at a constant rate, each tuned",
  source="Loshchilov and Hutter (2017); common practice with large batches",
  expected="above 0",
  unit="without minus with cosine",
)
LARS_LAMB_HELP = unjudged(
  "lars_lamb_help",
  statement="Rates of their own for each layer help at the largest batch size: the better of LARS and LAMB ends with a smaller test error "
  "than the better of momentum and AdamW, each tuned, under the same schedule",
  source="You et al. (2017, 2019); Nado et al. (2021) found that they do not",
  expected="above 0",
  unit="momentum or AdamW minus LARS or LAMB",
)


class Comparison(NamedTuple):
  """The error of one arm minus that of another at one batch size; `note` says why there is no interval, where there is none."""

  batch_size: int
  without: str
  with_it: str
  difference: Interval
  num_seeds: int
  verdict: Verdict
  note: str = ""


class _Reader(NamedTuple):
  """Outcomes by batch size and arm, and the least difference worth a name."""

  study: Mapping
  records: Mapping[str, Record]
  metric: str

  def outcome(self, size: int, arm: str) -> Outcome | None:
    return read_outcome(self.study, self.records, size, arm, self.metric)

  @property
  def baseline(self) -> Interval:
    found = self.outcome(self.study["reference_batch_size"], self.study["baseline"])
    return found.mean if found is not None else UNKNOWN

  @property
  def sign(self) -> str:
    """What stands behind an error."""
    return " %" if self.metric == "test_accuracy" else ""

  @property
  def sizes(self) -> list[int]:
    """The large batch sizes, the largest first."""
    return sorted(self.study["batch_sizes"], reverse=True)

  def least(self, compared: Outcome) -> float:
    """Returns the least difference worth a name; without a baseline it is a part of the compared arm's own error."""
    error = self.baseline.value if math.isfinite(self.baseline.value) else compared.mean.value
    one_example = 100 / self.study["test_size"] if self.metric == "test_accuracy" else 0.0
    return max(LEAST_SHARE * abs(error), one_example)

  def compare(self, size: int, without: str, with_it: str) -> Comparison:
    """Judges whether `with_it` ends with a smaller error than `without`; see `judge_warmup_needed` for the rule."""
    first, second = self.outcome(size, without), self.outcome(size, with_it)
    empty = Comparison(size, without, with_it, UNKNOWN, 0, "inconclusive")
    if first is None or second is None:
      return empty._replace(note=_untrained([arm for arm in (without, with_it) if self.outcome(size, arm) is None]))
    if first.diverged or second.diverged:
      lost = [(arm, o) for arm, o in ((without, first), (with_it, second)) if o.diverged]
      verdict: Verdict = "inconclusive" if len(lost) == 2 else "holds" if first.diverged else "fails"
      counts = " and ".join(f"{o.loss} with {NAMES[arm]}" for arm, o in lost)
      return empty._replace(verdict=verdict, note=f"{counts}, so {'neither wins' if len(lost) == 2 else 'it loses'}")
    difference = paired_difference(first, second)
    common = len({*first.seeds} & {*second.seeds})
    verdict = positive(difference, least=self.least(second))
    note = (
      "" if common > 1 else f"{NAMES[without]} and {NAMES[with_it]} completed {common} seeds in common, 2 are needed"
    )
    return Comparison(size, without, with_it, difference, common, verdict, note)


def _untrained(arms: Sequence[str]) -> str:
  if any(arm in RECIPES for arm in arms):
    return "the baseline has no rate to scale, for all its trials diverged"
  return f"{' and '.join(arms)} {'was' if len(arms) == 1 else 'were'} not trained: add {','.join(arms)} to --arms"


def _reader(study: Mapping, records: Sequence[Record]) -> _Reader:
  finals = [record for record in records if record.trial.get("kind") == "final"]
  return _Reader(study, {record.id: record for record in finals}, error_metric(finals))


def judge_warmup_needed(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether momentum at a constant rate ends worse without a gradual warm-up, at the largest batch size.

  Compared are test errors in percent (the test loss, for a workload without accuracy) at the end of equal epochs, over final seeds, which
  chose nothing. The difference, without minus with, is paired by seed and carries Student's interval (`paired_difference`).

  Rule, at each batch size: holds if the interval lies above 0; fails if it lies below the least difference, a tenth of the small-batch
  baseline's error and at least one example of the test set; else inconclusive. Where final seeds of one arm diverged, or all trials
  of its search, that arm loses, and no difference is told; where those of both did, inconclusive. The verdict is that of the largest batch
  size; the reading tells the others, the same comparison under a cosine, and the linear rule as it stands.

  Series: arm, batch_size, seed, error, one entry for each final seed; mean_arm, mean_batch_size, mean, mean_low, mean_high,
  mean_seeds, mean_diverged; compared_batch_size, compared_without, compared_with, difference, difference_low, difference_high,
  difference_verdict; baseline_batch_size, baseline, baseline_low, baseline_high and in_percent (0-d).

  Source: Goyal et al. (2017), Table 1: at a batch of 8,192 images 24.84 % without, 23.74 % with gradual warm-up, both at the linear
  rule's rate; here that is the linear rule as it stands.
  """
  reader = _reader(study, records)
  pairs = {
    "": ("momentum_constant", "momentum_warmup"),
    "under a cosine": ("momentum_cosine", "momentum_warmup_cosine"),
    "by the linear rule as it stands": RECIPES,
  }
  return _finding(WARMUP_NEEDED, reader, _compare_pairs(reader, pairs))


def judge_cosine_helps(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether momentum with warm-up ends better under a cosine than at a constant rate, at the largest batch size.

  The cosine falls to 0 at the end of the budget. Rule, numbers and series: as `judge_warmup_needed`; beside it stands the same comparison
  without warm-up.

  Source: Loshchilov and Hutter (2017), equation 5. That decay helps at equal epochs is no news at small batches, where it averages away the
  noise at the end; the claim is that it helps with few steps and little noise, too.
  """
  reader = _reader(study, records)
  pairs = {
    "": ("momentum_warmup", "momentum_warmup_cosine"),
    "without warm-up": ("momentum_constant", "momentum_cosine"),
  }
  return _finding(COSINE_HELPS, reader, _compare_pairs(reader, pairs))


def judge_lars_lamb_help(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether the better of LARS and LAMB ends better than the better of momentum and AdamW, at the largest batch size.

  Which is the better of each two is chosen by the mean validation loss of the repeats, so that the test set chooses nothing. All four are
  tuned with equal numbers of trials over rate and warm-up, and decay by a cosine. Rule, numbers and series: as `judge_warmup_needed`, of
  all arms, and besides curve_arm, curve_batch_size, curve_epoch, curve_loss: the validation loss along the final trials, mean over those
  that completed; and tuned_arm, tuned_batch_size, tuned_learning_rate, tuned_loss, tuned_best: every trial of every search, and the
  rate that was chosen.

  Source: You et al. (2019, v3), tables 2 to 4. Nado et al. (2021), "A large batch optimizer reality check", found standard optimizers as
  good at the batch sizes that LARS and LAMB were made for, once tuned as well.
  """
  reader = _reader(study, records)
  comparisons = {size: {"": _compare_better(reader, size)} for size in reader.sizes}
  finding = _finding(LARS_LAMB_HELP, reader, comparisons, arms=[arm for arm in NAMES if arm not in RECIPES])
  return finding._replace(series=finding.series | _curves(reader) | _searches(study, records))


def _compare_pairs(reader: _Reader, pairs: Mapping[str, tuple[str, str]]) -> dict[int, dict[str, Comparison]]:
  return {size: {name: reader.compare(size, *pair) for name, pair in pairs.items()} for size in reader.sizes}


def _compare_better(reader: _Reader, size: int) -> Comparison:
  """Compares the better of each two, which needs all four."""
  untrained = [arm for arm in (*PLAIN, *LAYERWISE) if reader.outcome(size, arm) is None]
  plain, layerwise = (
    better_arm({arm: entry_of(reader.study, size, arm) for arm in arms}) for arms in (PLAIN, LAYERWISE)
  )
  if untrained:
    return Comparison(size, plain, layerwise, UNKNOWN, 0, "inconclusive", _untrained(untrained))
  return reader.compare(size, plain, layerwise)


def _finding(
  claim: Claim, reader: _Reader, comparisons: Mapping[int, Mapping[str, Comparison]], *, arms: Sequence[str] = ()
) -> Finding:
  """Judges a claim by the first comparison at the largest batch size; all others stand beside it.

  Args:
    comparisons: by batch size, the largest first, and by what is different in them; the one called "" is the claim's own.
    arms: whose errors the series hold; by default those that are compared.
  """
  decisive = next(iter(comparisons.values()))[""]
  unit = "percentage points of test error" if reader.metric == "test_accuracy" else "test loss"
  claim = claim._replace(unit=f"{unit}, {claim.unit}")
  if decisive.num_seeds or decisive.verdict != "inconclusive":  # a verdict without a number: one arm diverged
    claim = judged(claim, decisive.difference, n=decisive.num_seeds, verdict=decisive.verdict)
  every = [comparison for here in comparisons.values() for comparison in here.values()]
  shown = arms or [*dict.fromkeys(arm for comparison in every for arm in (comparison.without, comparison.with_it))]
  return Finding(claim, _series(reader, shown, every), _reading(reader, comparisons))


def _series(reader: _Reader, arms: Sequence[str], comparisons: Sequence[Comparison]) -> dict[str, np.ndarray]:
  found = [
    (arm, size, outcome)
    for size in sorted(reader.sizes)
    for arm in arms
    if (outcome := reader.outcome(size, arm)) is not None
  ]
  baseline = reader.baseline
  return {
    **columns(
      "arm batch_size seed error",
      [
        (arm, size, seed, error)
        for arm, size, outcome in found
        for seed, error in zip(outcome.seeds, outcome.errors, strict=True)
      ],
    ),
    **columns(
      "mean_arm mean_batch_size mean mean_low mean_high mean_seeds mean_diverged",
      [(arm, size, *outcome.mean, len(outcome.seeds), outcome.diverged) for arm, size, outcome in found],
    ),
    **columns(
      "compared_batch_size compared_without compared_with difference difference_low difference_high difference_verdict",
      [(c.batch_size, c.without, c.with_it, *c.difference, c.verdict) for c in comparisons],
    ),
    "baseline_batch_size": np.asarray(reader.study["reference_batch_size"]),
    "baseline": np.asarray(baseline.value),
    "baseline_low": np.asarray(baseline.low),
    "baseline_high": np.asarray(baseline.high),
    "in_percent": np.asarray(reader.metric == "test_accuracy"),
  }


def _curves(reader: _Reader) -> dict[str, np.ndarray]:
  """Returns the validation loss along the final trials of every tuned arm, the baseline's too: the mean over those that completed."""
  study, rows = reader.study, []
  for size in (study["reference_batch_size"], *sorted(study["batch_sizes"])):
    for arm in [arm for arm in study["tuned"].get(str(size), {}) if arm not in RECIPES]:
      complete = [r for r in final_trials(study, reader.records, size, arm) if r.status.get("state") == "complete"]
      losses: dict[float, list[float]] = {}
      for record in complete:
        for row in record.metrics:
          if is_number(row.get("validation_loss")):
            losses.setdefault(row["examples_seen"] / study["train_size"], []).append(row["validation_loss"])
      rows += [(arm, size, epoch, float(np.mean(values))) for epoch, values in sorted(losses.items())]
  return columns("curve_arm curve_batch_size curve_epoch curve_loss", rows)


def _searches(study: Mapping, records: Sequence[Record]) -> dict[str, np.ndarray]:
  """Returns every trial of every search, with an infinite loss where it diverged, and whether its point was chosen."""
  rows = []
  for record in records:
    if record.trial.get("kind") == "search":
      size, arm, hparams = batch_size(record), record.trial["arm"], record.trial["hparams"]
      point = entry_of(study, size, arm).get("point") or {}
      chosen = bool(point) and all(hparams.get(name) == value for name, value in point.items())
      loss = last_metric(record, "validation_loss") if record.status.get("state") == "complete" else None
      rows.append((arm, size, hparams["learning_rate"], math.inf if loss is None else loss, chosen))
  return columns("tuned_arm tuned_batch_size tuned_learning_rate tuned_loss tuned_best", rows)


def _reading(reader: _Reader, comparisons: Mapping[int, Mapping[str, Comparison]]) -> str:
  """Says what came out at the largest batch size, then the differences at the others, then the other comparisons at the largest."""
  largest, *others = reader.sizes
  main, *beside = comparisons[largest].items()
  sentences = [f"at batch size {largest:,} {_main_clause(reader, main[1])}"]
  known = [comparisons[size][""] for size in others if comparisons[size][""].note != main[1].note or not main[1].note]
  if known:
    sentences.append("; ".join(f"at {c.batch_size:,}: {c.note or in_words(c.difference, '+z.3g')}" for c in known))
  if beside:
    clauses = "; ".join(f"{name} {comparison.note or _ends(reader, comparison)}" for name, comparison in beside)
    sentences.append(f"at {largest:,} {clauses}")
  return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _main_clause(reader: _Reader, comparison: Comparison) -> str:
  """Says how both arms end, and the baseline."""
  if comparison.note:
    return comparison.note
  what = "test error" if reader.metric == "test_accuracy" else "test loss"
  baseline, reference = reader.baseline, reader.study["reference_batch_size"]
  beside = f" (tuned baseline at batch size {reference:,}: {in_words(baseline, '.3g')}{reader.sign})"
  return (
    f"{NAMES[comparison.without]} and {NAMES[comparison.with_it]} end with a {what} of {_ends(reader, comparison)} over "
    f"{comparison.num_seeds} seeds{beside if math.isfinite(baseline.value) else ''}"
  )


def _ends(reader: _Reader, comparison: Comparison) -> str:
  """Writes the mean errors of both arms and their difference."""
  outcomes = (reader.outcome(comparison.batch_size, arm) for arm in (comparison.without, comparison.with_it))
  first, second = (f"{outcome.mean.value:.3g}" for outcome in outcomes if outcome is not None)
  return f"{first} and {second}{reader.sign}, a difference of {in_words(comparison.difference, '+z.3g')}"
