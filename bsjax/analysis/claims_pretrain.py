"""The judges of the advice to pre-train with large batches and to fine-tune with small ones."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.analysis.claim import Finding, Verdict, columns, conjunction, in_words, inside, judged, positive, unjudged
from bsjax.analysis.finite_trials import mean_interval
from bsjax.analysis.fits import UNKNOWN, Interval
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
  statement="Up to the critical batch size, large batches lose nothing in pre-training at equal epochs",
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

  Rule, at each batch size: nothing is lost if the whole interval lies below `LOSS_MARGIN`; something is lost if it lies above, or if a
  seed diverged. The claim fails if something is lost at a batch size up to the lower end of the noise scale's interval; it holds if nothing
  is lost at any batch size up to the upper end, and there is one; otherwise, or without such an interval, it is inconclusive. For losses
  grow with the batch size: nothing lost at one that may lie beyond the critical one means nothing lost up to that, while something lost
  there says nothing.

  `measured`, of a claim that fails: at the batch size that loses most, of those up to the lower end where no seed diverged; none without
  such. Of one that holds: at the largest up to the upper end. Of one left open: at the largest up to the upper end that does not hold.

  Series: seed_arm, seed_batch_size, seed, loss: each final seed of each arm; mean_arm, mean_batch_size, mean, mean_low, mean_high,
  mean_diverged; excess_batch_size, excess, excess_low, excess_high, excess_verdict; noise_scale, noise_scale_low, noise_scale_high (0-d).
  """
  part, finals = study["parts"][PRETRAIN], _finals(records[PRETRAIN])
  critical = noise_at_reference(part, records[PRETRAIN])
  found = [_excess(part, finals, size) for size in part["batch_sizes"][1:]]
  verdict, decisive = _up_to(critical, found)
  claim = PRETRAIN_LARGE._replace(statement=f"{PRETRAIN_LARGE.statement}, with {_ways(list(part['arms']))}")
  if decisive is not None:
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

  Test errors at the end of equal epochs, at final seeds (the test loss, where the task has no accuracy); for each of the two starts the
  mean of the largest third of batch sizes minus that of the smallest third, paired by seed (`thirds`). A batch size where a seed diverged
  is left out.

  Rule, for each start: holds if the interval lies above 0; fails if it lies below the least difference, `ERROR_MARGIN` of the mean error
  and at least one test example; else inconclusive. A start can not hold, and is inconclusive instead, if a batch size of the smallest third
  of those planned was left out. The claim holds if it holds for every start that was fine-tuned, and fails if it fails for one. `measured`
  is that of the start that decides; `n` counts the seeds that both of its thirds have.

  Series: seed_arm (the part), seed_batch_size, seed, loss (the error) for each final seed; mean_arm, mean_batch_size, mean, mean_low,
  mean_high, mean_diverged; start, pretrain_batch_size, difference, difference_low, difference_high, difference_verdict for each start;
  in_percent (0-d).
  """
  parts = {name: study["parts"][name] for name in FINETUNE if name in study["parts"]}
  metric = error_metric([record for name in parts for record in _finals(records[name]).values()])
  outcomes: dict[tuple[str, int], Outcome] = {}
  rows: list[tuple[Any, ...]] = []
  num_seeds: dict[str, int] = {}
  for name, part in parts.items():
    finals = _finals(records[name])
    (arm,) = part["arms"]
    here = {size: read_outcome(part, finals, size, arm, metric) for size in part["batch_sizes"]}
    outcomes |= {(name, size): outcome for size, outcome in here.items() if outcome is not None}
    whole = {size: o for size, o in here.items() if o is not None and not o.diverged and len(o.errors) >= 2}
    difference, num_seeds[name] = thirds(whole)
    example = 100 / part["test_size"] if metric == "test_accuracy" else 0.0
    mean = float(np.mean([outcome.errors.mean() for outcome in whole.values()])) if whole else math.nan
    verdict = positive(difference, least=max(ERROR_MARGIN * mean, example))
    if verdict == "holds" and not whole.keys() >= {*_ends(part["batch_sizes"])[0]}:
      verdict = "inconclusive"
    rows.append((name, part["pretrain_batch_size"], *difference, verdict))
  claim = FINETUNE_SMALL
  known = [row for row in rows if math.isfinite(row[2])]
  if known:
    verdict = conjunction(*(row[-1] for row in rows))
    decisive = next(row for row in [*known, *rows] if row[-1] == verdict)
    unit = "percentage points of test error" if metric == "test_accuracy" else "test loss"
    claim = claim._replace(unit=f"{unit}, {claim.unit}, pre-trained at batch size {decisive[1]}")
    claim = judged(claim, Interval(*decisive[2:5]), n=num_seeds[decisive[0]], verdict=verdict)
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


def _up_to(critical: Interval, found: Sequence[_Excess]) -> tuple[Verdict, _Excess | None]:
  """Judges by the rule of `judge_pretrain_large`; returns the batch size that decides, too, or None without one."""
  if not (math.isfinite(critical.low) and math.isfinite(critical.high)):
    return "inconclusive", None
  within = sorted((e for e in found if e.batch_size <= critical.high), key=lambda e: e.batch_size)
  lost = [e for e in within if e.verdict == "fails" and e.batch_size <= critical.low]
  if lost:
    known = [e for e in lost if math.isfinite(e.relative.value)]
    return "fails", max(known, key=lambda e: e.relative.value) if known else lost[-1]
  unsure = [e for e in within if e.verdict != "holds"]
  if unsure or not within:
    return "inconclusive", unsure[-1] if unsure else None
  return "holds", within[-1]


def thirds(outcomes: Mapping[int, Outcome]) -> tuple[Interval, int]:
  """Returns the mean error of the largest third of batch sizes minus that of the smallest third, and over how many seeds.

  A third is at least one batch size. For each seed that all of them have: its mean over the largest third minus its mean over the
  smallest; then the mean over seeds with Student's interval. A seed starts from the same pre-trained network at every batch size, so
  pairing takes the part out that a start adds at every batch size alike. The interval is over seeds given these pre-trained networks
  (at most `MOST_STARTS` of the plan), not over new pre-training.

  Args:
    outcomes: by batch size; none with diverged seeds.

  Returns: UNKNOWN with fewer than two batch sizes or two common seeds.
  """
  if len(outcomes) < 2:
    return UNKNOWN, 0
  sides = [
    [dict(zip(outcomes[size].seeds, outcomes[size].errors, strict=True)) for size in third] for third in _ends(outcomes)
  ]
  seeds = sorted(set.intersection(*({*errors} for side in sides for errors in side)))
  if len(seeds) < 2:
    return UNKNOWN, len(seeds)
  small, large = (np.mean([[errors[seed] for seed in seeds] for errors in side], axis=0) for side in sides)
  return mean_interval(large - small), len(seeds)


def _ends(sizes: Iterable[int]) -> tuple[list[int], list[int]]:
  """Returns the smallest and the largest third of batch sizes, at least one each."""
  ordered = sorted(sizes)
  third = max(1, len(ordered) // 3)
  return ordered[:third], ordered[-third:]


def _ways(arms: Sequence[str]) -> str:
  """Says how was pre-trained: "warm-up, a cosine and the better of AdamW and LAMB, each tuned"."""
  shared = " + warm-up + cosine"
  alike = all(NAMES[arm].endswith(shared) for arm in arms)
  names = [NAMES[arm].removesuffix(shared) if alike else NAMES[arm] for arm in arms]
  best = "" if len(names) == 1 else f"the {'better' if len(names) == 2 else 'best'} of "
  listed = " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
  return f"{'warm-up, a cosine and ' if alike else ''}{best}{listed}, {'tuned' if len(names) == 1 else 'each tuned'}"


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
  known = math.isfinite(critical.low) and math.isfinite(critical.high)
  scale = f"{in_words(critical, ',.0f')} examples" if math.isfinite(critical.value) else "not known"
  clauses = [
    (excess.note or f"{in_words(Interval(*(100 * end for end in excess.relative)), '+z.1f')} %")
    + f" at {excess.batch_size:,} ({NAMES[excess.arm]})"
    for excess in found
  ]
  unsure = [f"{excess.batch_size:,}" for excess in found if critical.low < excess.batch_size <= critical.high]
  beyond = [f"{excess.batch_size:,}" for excess in found if known and excess.batch_size > critical.high]
  return (
    f"The gradient noise scale in the middle of pre-training at batch size {smallest:,} is {scale}. The test loss of a batch "
    f"size against that of {smallest:,}: {'; '.join(clauses)}."
    + (
      f" Batch sizes within the interval of the noise scale, where a loss decides nothing: {', '.join(unsure)}."
      if unsure
      else ""
    )
    + (f" Beyond the noise scale, and not judged: {', '.join(beyond)}." if beyond else "")
  )


def _finetune_reading(rows: Sequence[tuple[Any, ...]], outcomes: Mapping[tuple[str, int], Outcome], metric: str) -> str:
  if not rows:
    return "Nothing was fine-tuned: no pre-training trial completed."
  sign = " points" if metric == "test_accuracy" else ""
  clauses = [
    f"of what batch size {size:,} pre-trained, the largest third ends {in_words(Interval(*difference), '+z.2f')}{sign} above the smallest"
    if math.isfinite(difference[0])
    else f"of what batch size {size:,} pre-trained, there are not two batch sizes with two seeds in common"
    for _, size, *difference, _ in rows
  ]
  pretrained = {name: f"{size:,}" for name, size, *_ in rows}
  lost = [f"{size:,} (pre-trained at {pretrained[part]})" for (part, size), o in outcomes.items() if o.diverged]
  demoted = [f"{size:,}" for _, size, _, low, _, verdict in rows if low > 0 and verdict == "inconclusive"]
  means: dict[str, list[tuple[float, int]]] = {}
  for (part, size), outcome in outcomes.items():
    if math.isfinite(outcome.mean.value):
      means.setdefault(pretrained[part], []).append((outcome.mean.value, size))
  best = {start: min(of_start) for start, of_start in means.items()}
  lowest = "; ".join(f"{value:.4g} at {size:,}, pre-trained at {start}" for start, (value, size) in best.items())
  text = "; ".join(clauses)
  error = "test error in percent" if metric == "test_accuracy" else "test loss"
  return (
    f"{text[0].upper()}{text[1:]}."
    + (f" The lowest mean {error} is {lowest}." if lowest else "")
    + (f" Left out, for seeds that diverged: batch size {', '.join(lost)}." if lost else "")
    + (f" Left open, without a whole smallest third: pre-trained at {', '.join(demoted)}." if demoted else "")
  )
