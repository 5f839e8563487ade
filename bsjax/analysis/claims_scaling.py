"""The judge of the scaling rules: does any rule carry the best learning rate between all batch sizes?"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.analysis.claim import Finding, Verdict, columns, in_words, judged, unjudged
from bsjax.analysis.fits import Interval, loglog_slope
from bsjax.analysis.regret import (
  ADAM,
  RULES,
  Lattice,
  Regrets,
  Worst,
  adam_regret,
  best_rates,
  mean_regret,
  measure_regrets,
  noise_scales,
  off_lattice,
  read_lattice,
  rule_factor,
  rule_shifts,
  worst_regret,
)
from bsjax.records import Record

LEAST_LOSS = 1.2
"""A rule fits if it nowhere costs more than a fifth of the steps."""
MIN_SIZES, MIN_SEEDS = 2, 2
NEAR_FACTOR = 4.0
"""A near pair: batch sizes at most this factor apart."""
ADAM_RULE = "adam_sqrt"
SELECTIONS = ("all", "up", "down", "near", "from_smallest", "from_largest")
"""Which pairs a summary averages: all; to a larger size; to a smaller one; near ones; from the smallest size; from the largest."""

NO_RULE_FITS_ALL = unjudged(
  "no_rule_fits_all",
  statement="No rule carries the best learning rate from every batch size to every larger one: each costs steps somewhere",
  source="Shallue et al. (2019), sections 4.5 and 4.6: the best rates of their workloads follow neither the linear nor the square "
  "root rule consistently",
  expected=f"above {LEAST_LOSS:g}",
  unit="steps / steps at the best rate, at the worst pair of batch sizes, by the rule that loses least there",
)


class Measured(NamedTuple):
  """What the rules cost with one optimizer, which has at least two batch sizes and two seeds."""

  lattice: Lattice
  scales: dict[int, float]
  regrets: Regrets


def judge_no_rule_fits_all(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether every rule loses at least a fifth of the steps somewhere, when the batch size grows.

  For each rule (none, sqrt, linear, noise) the worst regret over all optimizers and all pairs of batch sizes b0 < b, with its interval
  (`worst_regret`: the pair is chosen on some seeds and judged on others). `measured` is the smallest of these over the rules.

  Rule: holds if every rule's interval lies above `LEAST_LOSS`; fails if some rule's lies below; else inconclusive, as without two batch
  sizes, without two seeds, or for a rule that was measured with only some of the optimizers. The interval of the claim is made of
  the rules' lowest lower end and lowest upper end. So it holds wrongly in at most 2.5 % of cases (each rule would have to look worse
  than it is); that one of four rules looks better than it is happens more often, but its upper end is that of all its pairs at
  once, which is wide. A rule that is good up to a certain batch size still fails here: the tables tell where.

  Series. lattice_optimizer, _batch_size, _rate, _steps (geometric mean over seeds, failures at the limit), _reached (share of seeds): the
  lattice. best_optimizer, _batch_size, _rate (refined), _steps, _noise_scale. curve_optimizer, _rule, _factor (b / b0), _regret, _low,
  _high, _pairs: mean over pairs at one ratio. summary_optimizer, _rule, _selection (`SELECTIONS`), _regret, _low, _high, _pairs.
  worst_optimizer, _rule, _from, _to, _regret, _low, _high: upwards; optimizer "" for all together. slope_optimizer, _value,
  _low, _high: best rate against batch size. offset_optimizer, _rule, _factor: how far off the lattice carried rates lie at most.
  reference_optimizer, _rule, _batch_size, _rate (not rounded), _regret, _low, _high: from the reference batch size, Adam's own rule among
  them. left_optimizer, left_batch_size, left_reason. limit: the largest regret there can be;
  reference: the reference batch size.
  """
  lattices = [read_lattice(study, records, optimizer) for optimizer in study["optimizers"]]
  scales = {lattice.optimizer: noise_scales(records, lattice.optimizer) for lattice in lattices}
  usable = [
    Measured(lattice, scales[lattice.optimizer], measure_regrets(lattice, scales[lattice.optimizer]))
    for lattice in lattices
    if len(lattice.batch_sizes) >= MIN_SIZES and len(study["seeds"]) >= MIN_SEEDS
  ]
  worst = _worst_of_rules(usable)
  series = _series(study, records, lattices, scales, usable, worst)
  left_out = _left_out(lattices, [rule for rule in RULES if usable and rule not in worst])
  if not worst:
    reading = "One seed cannot both choose a rate and judge it, so no rule is judged."
    if len(study["seeds"]) >= MIN_SEEDS:
      reading = "No optimizer has two batch sizes whose best rate is known, so no rule is judged."
    return Finding(NO_RULE_FITS_ALL, series, f"{reading} {left_out}".strip())
  least = min(worst, key=lambda rule: worst[rule].regret.value)
  interval = Interval(
    worst[least].regret.value,
    min(each.regret.low for each in worst.values()),
    max(worst[least].regret.value, min(each.regret.high for each in worst.values())),
  )
  verdict: Verdict = "holds" if interval.low > LEAST_LOSS else "fails" if interval.high < LEAST_LOSS else "inconclusive"
  claim = judged(
    NO_RULE_FITS_ALL,
    interval,
    n=sum(int(_upwards(each.lattice)[each.regrets.measured[RULES.index(least)]].sum()) for each in usable),
    verdict=verdict,
  )
  return Finding(claim, series, f"{_reading(usable, worst, least, verdict)} {left_out}".strip())


def _upwards(lattice: Lattice) -> np.ndarray:
  """Marks the pairs from a smaller to a larger batch size, bool[S, S]."""
  return lattice.batch_sizes[:, None] < lattice.batch_sizes


def _worst_of_rules(usable: Sequence[Measured]) -> dict[str, Worst]:
  """Finds the worst upward pair over all optimizers for each rule that was measured with every one of them."""
  regrets, masks = [each.regrets for each in usable], [_upwards(each.lattice) for each in usable]
  found = {}
  for at, rule in enumerate(RULES):
    if usable and all((mask & each.measured[at]).any() for each, mask in zip(regrets, masks, strict=True)):
      worst = worst_regret(regrets, rule, masks)
      assert worst is not None
      found[rule] = worst
  return found


def _selections(lattice: Lattice) -> dict[str, np.ndarray]:
  """Builds the mask of each of `SELECTIONS`, bool[S, S]."""
  up, places = _upwards(lattice), np.arange(len(lattice.batch_sizes))
  ratio = lattice.batch_sizes / lattice.batch_sizes[:, None]
  near = np.maximum(ratio, 1 / ratio) <= NEAR_FACTOR
  row = np.broadcast_to(places[:, None], up.shape)
  masks = (np.ones_like(up), up, up.T, near, row == 0, row == len(places) - 1)
  return dict(zip(SELECTIONS, masks, strict=True))


def _series(
  study: Mapping[str, Any],
  records: Sequence[Record],
  lattices: Sequence[Lattice],
  scales: Mapping[str, Mapping[int, float]],
  usable: Sequence[Measured],
  worst: Mapping[str, Worst],
) -> dict[str, np.ndarray]:
  parts: dict[str, list[tuple]] = {
    name: [] for name in ("lattice", "best", "curve", "summary", "worst", "slope", "offset", "reference", "left")
  }
  for lattice in lattices:
    best = best_rates(lattice)
    parts["left"] += [(lattice.optimizer, size, reason) for size, reason in lattice.left_out.items()]
    parts["lattice"] += _lattice_rows(lattice)
    parts["best"] += [
      (lattice.optimizer, size, each.rate, each.steps, scales[lattice.optimizer].get(int(size), np.nan))
      for size, each in zip(lattice.batch_sizes, best, strict=True)
    ]
    if len(best) > 1:
      slope = loglog_slope(lattice.batch_sizes, np.array([each.rate for each in best]))
      parts["slope"].append((lattice.optimizer, *slope))
  for rule, found in worst.items():
    parts["worst"].append(("", rule, *_pair(usable[found.which].lattice, found), *found.regret))
  for each in usable:
    lattice, optimizer = each.lattice, each.lattice.optimizer
    shifts = rule_shifts(lattice.batch_sizes, each.scales)
    for at, rule in enumerate(RULES):
      parts["offset"].append((optimizer, rule, off_lattice(shifts[at])))
      parts["curve"] += _curve_rows(each, rule)
      for name, mask in _selections(lattice).items():
        mean, pairs = mean_regret(each.regrets, rule, mask)
        parts["summary"].append((optimizer, rule, name, *mean, pairs))
      own = worst_regret([each.regrets], rule, [_upwards(lattice)])
      if own is not None:
        parts["worst"].append((optimizer, rule, *_pair(lattice, own), *own.regret))
    parts["reference"] += _reference_rows(study, records, each)
  return (
    columns("lattice_optimizer lattice_batch_size lattice_rate lattice_steps lattice_reached", parts["lattice"])
    | columns("best_optimizer best_batch_size best_rate best_steps best_noise_scale", parts["best"])
    | columns("curve_optimizer curve_rule curve_factor curve_regret curve_low curve_high curve_pairs", parts["curve"])
    | columns(
      "summary_optimizer summary_rule summary_selection summary_regret summary_low summary_high summary_pairs",
      parts["summary"],
    )
    | columns("worst_optimizer worst_rule worst_from worst_to worst_regret worst_low worst_high", parts["worst"])
    | columns("slope_optimizer slope_value slope_low slope_high", parts["slope"])
    | columns("offset_optimizer offset_rule offset_factor", parts["offset"])
    | columns(
      "reference_optimizer reference_rule reference_batch_size reference_rate reference_regret reference_low reference_high",
      parts["reference"],
    )
    | columns("left_optimizer left_batch_size left_reason", parts["left"])
    | {
      "limit": np.asarray(float(study["give_up_factor"])),
      "reference": np.asarray(float(study["reference_batch_size"])),
    }
  )


def _pair(lattice: Lattice, worst: Worst) -> tuple[int, int]:
  return tuple(int(lattice.batch_sizes[at]) for at in worst.pair)  # type: ignore[return-value]


def _lattice_rows(lattice: Lattice) -> list[tuple]:
  """Describes the rates of each batch size as far out as the first that fails at every seed on either side of the best."""
  rows = []
  for at, size in enumerate(lattice.batch_sizes):
    means, reached = lattice.log_steps[:, at].mean(axis=0), 1 - lattice.failed[:, at].mean(axis=0)
    some = np.flatnonzero(reached)
    for k in range(max(0, some[0] - 1), min(len(means), some[-1] + 2)):
      if lattice.known[at, k]:
        rows.append((lattice.optimizer, size, lattice.rates[k], float(np.exp(means[k])), reached[k]))
  return rows


def _curve_rows(each: Measured, rule: str) -> list[tuple]:
  sizes = each.lattice.batch_sizes
  ratio = sizes / sizes[:, None]
  rows = []
  for factor in np.unique(ratio[ratio != 1]):
    mean, pairs = mean_regret(each.regrets, rule, ratio == factor)
    if pairs:
      rows.append((each.lattice.optimizer, rule, factor, *mean, pairs))
  return rows


def _reference_rows(study: Mapping[str, Any], records: Sequence[Record], each: Measured) -> list[tuple]:
  """Compares all rules from the reference batch size, where it has a best rate; Adam's own rule is among them for adam."""
  lattice, reference = each.lattice, study["reference_batch_size"]
  if reference not in lattice.batch_sizes:
    return []
  at = int(np.flatnonzero(lattice.batch_sizes == reference)[0])
  rate, scale = lattice.rates[best_rates(lattice)[at].place], each.scales.get(reference, np.nan)
  rows = []
  for to, size in enumerate(lattice.batch_sizes):
    for rule in RULES:
      pair = np.zeros_like(each.regrets.measured[0])
      pair[at, to] = True
      mean, _ = mean_regret(each.regrets, rule, pair)
      rows.append((lattice.optimizer, rule, size, rate * rule_factor(rule, reference, size, scale), *mean))
    if lattice.optimizer == ADAM:
      mean = adam_regret(study, records, lattice, each.regrets, int(size))
      rows.append((lattice.optimizer, ADAM_RULE, size, rate * rule_factor("sqrt", reference, size), *mean))
  return rows


def _reading(usable: Sequence[Measured], worst: Mapping[str, Worst], least: str, verdict: Verdict) -> str:
  pair = _pair(usable[worst[least].which].lattice, worst[least])
  limit = usable[0].lattice.give_up_factor
  opening = {
    "holds": "Every rule costs steps somewhere",
    "fails": f"The rule {least} fits everywhere",
    "inconclusive": "Whether a rule fits everywhere is left open",
  }[verdict]
  at_least = "at least " if worst[least].regret.value >= 0.99 * limit else ""
  others = ", ".join(f"{rule} {_times(worst[rule].regret, limit)}" for rule in worst if rule != least)
  first = (
    f"{opening}: upwards the rule {least} loses least at its worst, {at_least}{in_words(worst[least].regret)} times the steps of the best "
    f"rate (worst from B = {pair[0]:,} to {pair[1]:,}, {usable[worst[least].which].lattice.optimizer})"
    + (f", the others {others}" if others else "")
    + "."
  )
  means = []
  for each in usable:
    costs = {rule: mean_regret(each.regrets, rule, _upwards(each.lattice))[0].value for rule in worst}
    words = ", ".join(f"{rule} {cost:.2f}" for rule, cost in sorted(costs.items(), key=lambda item: item[1]))
    means.append(f"{each.lattice.optimizer}: {words}")
  return f"{first} On average over all upward pairs they cost, in times the steps: {'; '.join(means)}."


def _times(interval: Interval, limit: float) -> str:
  return f"at least {limit:g}" if interval.value >= 0.99 * limit else f"{interval.value:.2f}"


def _left_out(lattices: Sequence[Lattice], rules: Sequence[str]) -> str:
  """Says which batch sizes and rules are left out, and why."""
  clauses = [
    f"{lattice.optimizer} at B = {size:,} ({reason})"
    for lattice in lattices
    for size, reason in sorted(lattice.left_out.items())
  ]
  clauses += [f"the rule {rule} (not measured with every optimizer)" for rule in rules]
  return f"Left out: {'; '.join(clauses)}." if clauses else ""
