"""The judges of the advice to pre-train with large batches and to fine-tune with small ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.analysis.claim import Finding, Verdict, columns, conjunction, in_words, inside, judged, positive, unjudged
from bsjax.analysis.finite_trials import mean_interval
from bsjax.analysis.fits import UNKNOWN, Interval, welch
from bsjax.analysis.large_batch import (
  NAMES,
  Outcome,
  better_arm,
  error_metric,
  final_trials,
  large_batch_table,
  paired_difference,
  read_outcome,
)
from bsjax.analysis.selection import last_probe_value
from bsjax.records import Record

PRETRAIN, FINETUNE = "pretrain", ("finetune_small", "finetune_large")
"""The parts of a study: pre-training, and fine-tuning of what the smallest and of what the largest batch size pre-trained."""
LOSS_MARGIN = 0.05
"""The least loss of quality worth the name, in pre-training: this part of the small batch's test loss."""
ERROR_MARGIN = 0.1
"""The least difference worth the name, in fine-tuning: this part of the mean test error, and at least one example of the test set."""
Records = Mapping[str, Sequence[Record]]
"""The records of each part."""

PRETRAIN_LARGE = unjudged(
  "pretrain_large",
  statement="Up to the critical batch size, large batches lose nothing in pre-training at equal epochs, with warm-up, a cosine and the "
  "better of AdamW and LAMB, each tuned",
  source="common advice; You et al. (2019); McCandlish et al. (2018) for the critical batch size",
  expected=f"at most {LOSS_MARGIN:.0%} more",
  unit="test loss over that of the smallest batch size, minus 1",
)
FINETUNE_SMALL = unjudged(
  "finetune_small",
  statement="Small batches fine-tune better: at equal epochs, the smallest third of batch sizes ends with a smaller test error than the "
  "largest third, each tuned",
  source="common advice",
  expected="above 0",
  unit="largest third minus smallest third",
)


class _Excess(NamedTuple):
  """How much more test loss a batch size ends with than the smallest one; `note` says why there is no interval, where there is none."""

  batch_size: int
  arm: str
  relative: Interval
  num_seeds: int
  verdict: Verdict
  note: str = ""


def noise_at_reference(part: Mapping, records: Sequence[Record]) -> Interval:
  """Returns the gradient noise scale in the middle of pre-training at the smallest batch size, in examples.

  That of the training set as all there is, `tr(Sigma) / |G|^2`; the geometric mean over the final seeds of the better arm, with Student's
  interval of the logarithm.
  """
  size = part["batch_sizes"][0]
  trials = final_trials(part, {record.id: record for record in records}, size, better_arm(part["tuned"][str(size)]))
  values = [last_probe_value(record, "noise", "dataset_noise_scale") for record in trials]
  logs = mean_interval(np.log([value for value in values if value is not None and value > 0]))
  return Interval(*(float(np.exp(end)) for end in logs))


def judge_pretrain_large(study: Mapping, records: Records) -> Finding:
  """Judges whether pre-training at equal epochs ends as well at every batch size up to the critical one as at the smallest.

  At each batch size the better of the arms counts, chosen by the mean validation loss of their repeats. Its test loss at the end, over
  final seeds, minus that of the smallest batch size, is paired by seed and taken relative to the latter's mean (`paired_difference`). The
  critical batch size is the gradient noise scale in the middle of the smallest batch size's pre-training (`noise_at_reference`).

  Rule, at each batch size: nothing is lost if the whole interval lies below `LOSS_MARGIN`; something is lost if it lies above. The claim
  holds if nothing is lost at any batch size up to the critical one, and fails if something is lost at one of them; without such batch
  sizes, or without a noise scale, it is inconclusive. `measured` is that at the largest of them, or at the one that loses most.

  Series: seed_arm, seed_batch_size, seed, loss: each final seed of each arm; mean_arm, mean_batch_size, mean, mean_low, mean_high,
  mean_diverged; excess_batch_size, excess, excess_low, excess_high, excess_verdict; noise_scale, noise_scale_low, noise_scale_high (0-d).
  """
  part, finals = study["parts"][PRETRAIN], _finals(records[PRETRAIN])
  critical = noise_at_reference(part, records[PRETRAIN])
  found = [_excess(part, finals, size) for size in part["batch_sizes"][1:]]
  within = [excess for excess in found if excess.batch_size <= critical.value]
  claim = PRETRAIN_LARGE
  if within:
    verdict = conjunction(*(excess.verdict for excess in within))
    agreeing = [excess for excess in within if excess.verdict == verdict]
    decisive = max(agreeing, key=lambda e: (e.relative.value if verdict == "fails" else 0.0, e.batch_size))
    claim = judged(claim, decisive.relative, n=decisive.num_seeds, verdict=verdict)
    claim = claim._replace(unit=f"{claim.unit}, batch size {decisive.batch_size}")
  outcomes = {
    (arm, size): outcome
    for size in part["batch_sizes"]
    for arm in part["arms"]
    if (outcome := read_outcome(part, finals, size, arm, "test_loss")) is not None
  }
  series = _outcome_series(outcomes) | columns(
    "excess_batch_size excess excess_low excess_high excess_verdict",
    [(e.batch_size, *e.relative, e.verdict) for e in found],
  )
  ends = {f"noise_scale{end}": np.asarray(value) for end, value in zip(("", "_low", "_high"), critical, strict=True)}
  return Finding(claim, series | ends, _pretrain_reading(part, found, critical))


def judge_finetune_small(study: Mapping, records: Records) -> Finding:
  """Judges whether small batches fine-tune better, from what a small and what a large batch size pre-trained.

  Test errors at the end of equal epochs, at final seeds (the test loss, where the task has no accuracy); the mean of the largest third of
  batch sizes minus that of the smallest third (`welch`), for each of the two starts.

  Rule, for each start: holds if the interval lies above 0; fails if it lies below the least difference, `ERROR_MARGIN` of the mean error
  and at least one test example; else inconclusive. The claim holds if it holds for every start that was fine-tuned, and fails if it fails
  for one. Where a seed diverged the batch size is left out. `measured` is that of the start that decides.

  Series: seed_arm (the part), seed_batch_size, seed, loss (the error) for each final seed; mean_arm, mean_batch_size, mean, mean_low,
  mean_high, mean_diverged; start, pretrain_batch_size, difference, difference_low, difference_high, difference_verdict for each start;
  in_percent (0-d).
  """
  parts = {name: study["parts"][name] for name in FINETUNE if name in study["parts"]}
  metric = error_metric([record for name in parts for record in _finals(records[name]).values()])
  outcomes: dict[tuple[str, int], Outcome] = {}
  rows: list[tuple[Any, ...]] = []
  for name, part in parts.items():
    finals = _finals(records[name])
    (arm,) = part["arms"]
    here = {size: read_outcome(part, finals, size, arm, metric) for size in part["batch_sizes"]}
    outcomes |= {(name, size): outcome for size, outcome in here.items() if outcome is not None}
    whole = {size: o.errors for size, o in here.items() if o is not None and not o.diverged and len(o.errors) >= 2}
    difference = thirds(whole)
    example = 100 / part["test_size"] if metric == "test_accuracy" else 0.0
    mean = float(np.mean([errors.mean() for errors in whole.values()])) if whole else math.nan
    verdict = positive(difference, least=max(ERROR_MARGIN * mean, example))
    rows.append((name, part["pretrain_batch_size"], *difference, verdict))
  claim = FINETUNE_SMALL
  known = [row for row in rows if math.isfinite(row[2])]
  if known:
    verdict = conjunction(*(row[-1] for row in rows))
    decisive = next(row for row in [*known, *rows] if row[-1] == verdict)
    unit = "percentage points of test error" if metric == "test_accuracy" else "test loss"
    claim = claim._replace(unit=f"{unit}, {claim.unit}, pre-trained at batch size {decisive[1]}")
    seeds = sum(len(outcome.errors) for (part, _), outcome in outcomes.items() if part == decisive[0])
    claim = judged(claim, Interval(*decisive[2:5]), n=seeds, verdict=verdict)
  names = "start pretrain_batch_size difference difference_low difference_high difference_verdict"
  series = _outcome_series(outcomes) | columns(names, rows) | {"in_percent": np.asarray(metric == "test_accuracy")}
  return Finding(claim, series, _finetune_reading(rows, outcomes, metric))


def pretrain_table(study: Mapping, records: Records) -> list[dict[str, Any]]:
  """Returns one flat row for each trial of each part, as `large_batch_table` does."""
  return [
    {"part": name} | row
    for name, part in study["parts"].items()
    for row in large_batch_table(dict(part), records[name])
  ]


def _finals(records: Sequence[Record]) -> dict[str, Record]:
  return {record.id: record for record in records if record.trial.get("kind") == "final"}


def _excess(part: Mapping, finals: Mapping[str, Record], size: int) -> _Excess:
  """Compares the better arm at a batch size with the better one at the smallest."""
  arms = {each: better_arm(part["tuned"][str(each)]) for each in (part["batch_sizes"][0], size)}
  small, large = (read_outcome(part, finals, each, arm, "test_loss") for each, arm in arms.items())
  nothing = _Excess(size, arms[size], UNKNOWN, 0, "inconclusive")
  if small is None or small.diverged or large is None:
    return nothing._replace(note="the smallest batch size has nothing to compare with")
  if large.diverged:
    return nothing._replace(verdict="fails", note=large.loss)
  difference = paired_difference(large, small)
  relative = Interval(*(end / small.mean.value for end in difference))
  return _Excess(size, arms[size], relative, len(large.seeds), inside(relative, -math.inf, LOSS_MARGIN))


def thirds(errors: Mapping[int, np.ndarray]) -> Interval:
  """Returns the mean error of the largest third of batch sizes minus that of the smallest third, at least one each."""
  sizes = sorted(errors)
  if len(sizes) < 2:
    return UNKNOWN
  third = max(1, len(sizes) // 3)
  return welch([errors[size] for size in sizes[-third:]], [errors[size] for size in sizes[:third]])


def _outcome_series(outcomes: Mapping[tuple[str, int], Outcome]) -> dict[str, np.ndarray]:
  return columns(
    "seed_arm seed_batch_size seed loss",
    [
      (arm, size, seed, error)
      for (arm, size), outcome in outcomes.items()
      for seed, error in zip(outcome.seeds, outcome.errors, strict=True)
    ],
  ) | columns(
    "mean_arm mean_batch_size mean mean_low mean_high mean_diverged",
    [(arm, size, *outcome.mean, outcome.diverged) for (arm, size), outcome in outcomes.items()],
  )


def _pretrain_reading(part: Mapping, found: Sequence[_Excess], critical: Interval) -> str:
  smallest = part["batch_sizes"][0]
  known = math.isfinite(critical.value)
  scale = f"{critical.value:,.0f} [{critical.low:,.0f}, {critical.high:,.0f}] examples" if known else "not known"
  clauses = [
    (excess.note or f"{in_words(Interval(*(100 * end for end in excess.relative)), '+z.1f')} %")
    + f" at {excess.batch_size:,} ({NAMES[excess.arm]})"
    for excess in found
  ]
  beyond = [f"{excess.batch_size:,}" for excess in found if not excess.batch_size <= critical.value]
  return (
    f"The gradient noise scale in the middle of pre-training at batch size {smallest:,} is {scale}. The test loss of a batch "
    f"size against that of {smallest:,}: {'; '.join(clauses)}."
    + (f" Beyond the noise scale, and not judged: {', '.join(beyond)}." if beyond and known else "")
  )


def _finetune_reading(rows: Sequence[tuple[Any, ...]], outcomes: Mapping[tuple[str, int], Outcome], metric: str) -> str:
  if not rows:
    return "Nothing was fine-tuned: no pre-training trial completed."
  sign = " points" if metric == "test_accuracy" else ""
  clauses = [
    f"of what batch size {size:,} pre-trained, the largest third ends {in_words(Interval(*difference), '+z.2f')}{sign} above the smallest"
    if math.isfinite(difference[0])
    else f"of what batch size {size:,} pre-trained, there are not two batch sizes to compare"
    for _, size, *difference, _ in rows
  ]
  lost = [f"{size:,}" for (_, size), outcome in outcomes.items() if outcome.diverged]
  best = {
    size: min((o.mean.value, batch) for (part, batch), o in outcomes.items() if part == name and not o.diverged)
    for name, size, *_ in rows
    if any(part == name and not o.diverged for (part, _), o in outcomes.items())
  }
  lowest = "; ".join(f"{value:.4g} at {batch:,}, pre-trained at {size:,}" for size, (value, batch) in best.items())
  text = "; ".join(clauses)
  return (
    f"{text[0].upper()}{text[1:]}. The lowest mean {'test error in percent' if metric == 'test_accuracy' else 'test loss'} is {lowest}."
    + (f" Left out, for seeds that diverged: batch size {', '.join(lost)}." if lost else "")
  )
