"""What it costs to carry a learning rate from one batch size to another by a rule: regret, cross-fitted over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.analysis.fits import RESAMPLING_SEED, UNKNOWN, Interval, percentiles, vertex
from bsjax.analysis.selection import batch_size, is_number, learning_rate, probe_rows, steps_to_target
from bsjax.records import Record

LATTICE_KIND, NOISE_KIND, ADAM_KIND = "lattice", "lattice_noise", "adam_sqrt"
"""Kinds of trials: those of the lattices, one at each best rate with noise probes, those at what Adam's own rule makes of the rate."""
ADAM = "adam"
POINTS_PER_OCTAVE = 2
"""Neighbouring rates differ by the square root of 2, so that the square-root rule leads from rate to rate between powers of two."""
EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
"""Rules that multiply the rate by a power of b / b0."""
NOISE_RULE = "noise"
RULES = (*EXPONENTS, NOISE_RULE)
NUM_DRAWS = 400
"""Bootstrap draws of the seeds: a tail of 2.5 % is then known to a fifth of itself, less than what few seeds leave open."""


class Lattice(NamedTuple):
  """Steps to the target of one optimizer over batch sizes, rates and seeds: S batch sizes, K rates common to all, n seeds.

  `failed` bool[n, S, K]: the trial diverged, never arrived, or needed more than the limit of its batch size, which is `give_up_factor`
  times the fewest steps; `log_steps` f64[n, S, K] is the logarithm of that limit there. Beyond a rate that failed at all seeds, on
  either side of the best, rates fail too; the first and the last rate stand for all beyond. `known` bool[S, K]: false where a rate was
  not tried and nothing is known of it. `left_out` gives the reason why a batch size is not among `batch_sizes`.
  """

  optimizer: str
  batch_sizes: np.ndarray
  rates: np.ndarray
  log_steps: np.ndarray
  failed: np.ndarray
  known: np.ndarray
  log_limits: np.ndarray
  give_up_factor: float
  left_out: dict[int, str]


class BestRate(NamedTuple):
  """The best rate of a batch size over all seeds: its place in the lattice, refined between its neighbours, and its mean steps."""

  place: int
  rate: float
  steps: float


class Regrets(NamedTuple):
  """Log regrets of Q rules for all ordered pairs of S batch sizes: f64[1 + R, n, Q, S, S], from the second last axis to the last.

  Row 0 is the measurement, the others are bootstrap draws of the seeds, whose counts are `weights` f64[1 + R, n]. `held_out` judges each
  seed at rates chosen on the others; `chosen_on` is the mean over those others, for choosing among pairs. `best` i64[1 + R, n, S] is the
  place of the best rate on the others. `measured` bool[Q, S, S]: pairs that are known in all rows, and not from a size to itself.
  """

  rules: tuple[str, ...]
  weights: np.ndarray
  held_out: np.ndarray
  chosen_on: np.ndarray
  best: np.ndarray
  measured: np.ndarray
  give_up_factor: float


def rate_index(rate: float, base_rate: float) -> int:
  """Returns k of the rate base_rate 2^(k/2).

  >>> rate_index(0.2, 0.1), rate_index(0.1 / 2**0.5, 0.1)
  (2, -1)
  """
  return round(POINTS_PER_OCTAVE * math.log2(rate / base_rate))


def clip_steps(steps: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns log steps, those of failed trials and of more than `limit` set to log(limit), and which these are."""
  failed = ~(np.asarray(steps, float) <= limit)
  return np.log(np.where(failed, limit, steps)), failed


def fewest_steps(steps: np.ndarray, factor: float) -> tuple[int, float] | None:
  """Finds the rate with the fewest steps in geometric mean over seeds; a failure, or more steps, counts as `factor` times the fewest.

  That number is not known at first: a first pass takes `factor` times the most steps of any trial that arrived.

  Args:
    steps: f64[n, K], NaN for a trial that did not arrive.

  Returns: the column and its mean steps; None if no trial arrived. Of equal rates the smaller.
  """
  if not np.isfinite(steps).any():
    return None
  limit = factor * float(np.nanmax(steps))
  for _ in range(2):
    means = clip_steps(steps, limit)[0].mean(axis=0)
    best = int(np.argmin(means))
    limit = factor * math.exp(means[best])
  return best, math.exp(means[best])


def trial_steps(study: Mapping[str, Any], record: Record) -> float:
  """Returns the steps of a trial to its target, NaN where it did not arrive."""
  steps = steps_to_target(record, study["target"])
  return math.nan if steps is None else float(steps)


def read_lattice(study: Mapping[str, Any], records: Sequence[Record], optimizer: str) -> Lattice:
  """Gathers the trials of one optimizer.

  A batch size is left out with its reason where no trial arrived, and where a trial of its lattice is missing or unfinished: without it
  neither the best rate nor a carried one is known. Of repeated trials the longest counts, at the batch size's own interval of evaluation.
  """
  seeds, base, factor = study["seeds"], study["base_rates"][optimizer], float(study["give_up_factor"])
  left_out: dict[int, str] = {}
  found = {}
  trials = _trials(records, LATTICE_KIND, optimizer)
  for size in map(int, study["batch_sizes"]):
    entry = study["lattices"].get(optimizer, {}).get(str(size))
    if entry is None or entry["reason"]:
      left_out[size] = entry["reason"] if entry else "it was not trained"
      continue
    first, last = entry["first"], entry["last"]
    steps = np.full((len(seeds), last - first + 1), np.nan)
    missing = {(row, k) for row in range(len(seeds)) for k in range(first, last + 1)}
    for record in sorted(trials.get(size, []), key=lambda r: (r.trial["config"]["num_steps"], r.id)):
      k, seed = rate_index(learning_rate(record), base), record.trial["seed"]
      if seed in seeds and first <= k <= last and record.trial["config"]["eval_every"] == entry["eval_every"]:
        steps[seeds.index(seed), k - first] = trial_steps(study, record)
        missing.discard((seeds.index(seed), k))
    if missing:
      left_out[size] = f"{len(missing)} of {steps.size} trials are missing"
      continue
    best = fewest_steps(steps, factor)
    if best is None:
      left_out[size] = "no trial reached the target"
      continue
    found[size] = steps, entry, factor * best[1]
  return _align(optimizer, base, found, factor, left_out, len(seeds))


def _trials(records: Sequence[Record], kind: str, optimizer: str) -> dict[int, list[Record]]:
  """Groups the finished trials of one kind by batch size."""
  groups: dict[int, list[Record]] = {}
  for record in records:
    of_kind = record.trial.get("kind") == kind and record.trial["config"]["optimizer"] == optimizer
    if of_kind and record.status.get("state") in ("complete", "diverged"):
      groups.setdefault(batch_size(record), []).append(record)
  return groups


def _align(
  optimizer: str,
  base: float,
  found: Mapping[int, tuple[np.ndarray, Mapping[str, Any], float]],
  factor: float,
  left_out: dict[int, str],
  num_seeds: int,
) -> Lattice:
  """Lays the lattices of all batch sizes side by side, with one rate more at either end, which stands for all beyond.

  Beyond a closed side trials would fail, beyond an open one nothing is known.
  """
  low = min((entry["first"] for _, entry, _ in found.values()), default=1) - 1
  high = max((entry["last"] for _, entry, _ in found.values()), default=-1) + 1
  shape = num_seeds, len(found), high - low + 1
  failed, known = np.ones(shape, bool), np.ones(shape[1:], bool)
  log_limits = np.log([limit for *_, limit in found.values()]) if found else np.empty(0)
  log_steps = np.broadcast_to(log_limits[None, :, None], shape).copy()
  for at, (steps, entry, limit) in enumerate(found.values()):
    inside = slice(entry["first"] - low, entry["last"] - low + 1)
    log_steps[:, at, inside], failed[:, at, inside] = clip_steps(steps, limit)
    known[at, : inside.start] = "low" not in entry["open"]
    known[at, inside.stop :] = "high" not in entry["open"]
  rates = base * 2.0 ** (np.arange(low, high + 1) / POINTS_PER_OCTAVE)
  sizes = np.array(list(found), int)
  return Lattice(optimizer, sizes, rates, log_steps, failed, known, log_limits, factor, left_out)


def best_rates(lattice: Lattice) -> list[BestRate]:
  """Finds the best rate of each batch size over all seeds.

  `rate` is the vertex of the parabola through the mean log steps of the best rate and its two neighbours, or the best rate itself where a
  neighbour failed at every seed.
  """
  found = []
  for at in range(len(lattice.batch_sizes)):
    means = lattice.log_steps[:, at].mean(axis=0)
    best = int(np.argmin(np.where(lattice.known[at], means, np.inf)))
    around = slice(best - 1, best + 2)
    whole = 0 < best < len(means) - 1 and not lattice.failed[:, at, around].all(axis=0).any()
    turn = vertex(np.log(lattice.rates[around]).tolist(), means[around].tolist()) if whole else None
    rate = float(lattice.rates[best]) if turn is None else math.exp(turn)
    found.append(BestRate(best, rate, math.exp(means[best])))
  return found


def noise_scales(records: Sequence[Record], optimizer: str) -> dict[int, float]:
  """Returns, by batch size, the geometric mean of the noise scales measured along one trial at the best rate, where there are any."""
  scales = {}
  for size, trials in _trials(records, NOISE_KIND, optimizer).items():
    values = [
      math.log(row["noise_scale"])
      for record in trials[-1:]
      for row in probe_rows(record, "noise")
      if row["group"] == "all" and is_number(row["noise_scale"]) and row["noise_scale"] > 0
    ]
    if values:
      scales[size] = math.exp(np.mean(values))
  return scales


def rule_factor(rule: str, b0: float, b: float, noise_scale: float = math.nan) -> float:
  """Returns what a rule multiplies the rate by from batch size b0 to b.

      (b / b0)^p with p = 0 ("none"), 1/2 ("sqrt"), 1 ("linear");        (1 + N / b0) / (1 + N / b) ("noise"), N = noise_scale

  Source: Goyal et al. (2017), section 2.1; McCandlish et al. (2018), equation 2.6, with the noise scale measured at b0.

  >>> [rule_factor(rule, 64, 256, 64.0) for rule in RULES]
  [1.0, 2.0, 4.0, 1.6]
  """
  if rule == NOISE_RULE:
    return (1 + noise_scale / b0) / (1 + noise_scale / b)
  return (b / b0) ** EXPONENTS[rule]


def rule_shifts(batch_sizes: np.ndarray, scales: Mapping[int, float]) -> np.ndarray:
  """Returns by how many places of the lattice each rule moves the rate: f64[Q, S, S], not rounded; NaN without a noise scale."""
  factors = [
    [[rule_factor(rule, b0, b, scales.get(int(b0), math.nan)) for b in batch_sizes] for b0 in batch_sizes]
    for rule in RULES
  ]
  return POINTS_PER_OCTAVE * np.log2(np.array(factors, float).reshape(len(RULES), len(batch_sizes), len(batch_sizes)))


def off_lattice(shifts: np.ndarray) -> float:
  """Returns the factor by which carried rates lie off the lattice at most; 1 where all lie on it."""
  off = np.abs(shifts - np.round(shifts))
  return float(2 ** (np.nanmax(off, initial=0) / POINTS_PER_OCTAVE)) if np.isfinite(off).any() else 1.0


def measure_regrets(lattice: Lattice, scales: Mapping[int, float]) -> Regrets:
  """Measures the log regret of every rule from every batch size b0 to every other b.

      regret = log steps(b, carried rate) - log steps(b, best rate of b),        carried rate = best rate of b0 x rule, on the lattice

  Both best rates are those of the other seeds, for each seed in turn, and its own steps at these rates are compared; regrets are averaged
  over the seeds. So what is measured is the regret to expect of one who tunes on n - 1 seeds at b0 and carries the rate, against one who
  tunes on n - 1 seeds at b; no seed judges a rate that it chose. A trial that fails where the other does not costs `give_up_factor`,
  which means at least that, and no regret is larger; if both fail there is none.

  Rates between two of the lattice are taken to be the nearest (`off_lattice` says by how much). Needs two seeds and a batch size.
  """
  num_seeds, num_sizes, num_rates = lattice.log_steps.shape
  shifts = rule_shifts(lattice.batch_sizes, scales)
  weights = draw_weights(num_seeds)
  log_steps, failed, known = lattice.log_steps, lattice.failed, lattice.known
  total = np.einsum("rn,nsk->rsk", weights, log_steps)
  others = total[:, None] - weights[:, :, None, None] * log_steps
  best = np.argmin(np.where(known, others, np.inf), axis=-1)
  usable = np.isfinite(shifts)
  moves = np.round(np.where(usable, shifts, 0)).astype(int)
  carried = np.clip(best[:, :, None, :, None] + moves, 0, num_rates - 1)
  draw = np.arange(len(weights))[:, None, None, None, None]
  seed = np.arange(num_seeds)[:, None, None, None]
  to = np.arange(num_sizes)
  own = best[:, :, None, None, :]
  held_out = compare(
    log_steps[seed, to, carried],
    failed[seed, to, carried],
    log_steps[seed, to, own],
    failed[seed, to, own],
    lattice.give_up_factor,
  )
  count = np.maximum(weights.sum(axis=1, keepdims=True) - weights, 1)[:, :, None, None, None]
  chosen_on = (others[draw, seed, to, carried] - others[draw, seed, to, own]) / count
  measured = usable & known[to, carried].all(axis=(0, 1)) & ~np.eye(num_sizes, dtype=bool)
  return Regrets(RULES, weights, held_out, chosen_on, best, measured, lattice.give_up_factor)


def draw_weights(num_seeds: int) -> np.ndarray:
  """Returns how often each seed counts, f64[1 + R, n]: once each, and then in bootstrap draws that hold at least two different seeds.

  A seed is drawn with its trials at all batch sizes: they begin from the same parameters.
  """
  draws = np.random.default_rng(RESAMPLING_SEED).multinomial(
    num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_DRAWS
  )
  return np.concatenate([np.ones((1, num_seeds)), draws[(draws > 0).sum(axis=1) > 1]])


def compare(
  log_steps: np.ndarray,
  failed: np.ndarray,
  best_log_steps: np.ndarray,
  best_failed: np.ndarray,
  give_up_factor: float,
) -> np.ndarray:
  """Returns the log regret of trials against trials at the best rate, at most log(give_up_factor) either way."""
  most = math.log(give_up_factor)
  difference = np.clip(log_steps - best_log_steps, -most, most)
  return np.where(failed & ~best_failed, most, np.where(failed & best_failed, 0.0, difference))


def interval_of(rows: np.ndarray, weights: np.ndarray, give_up_factor: float) -> Interval:
  """Averages log regrets over the seeds and returns them as a factor with its interval.

  The interval holds the middle 95 % of the bootstrap draws, whose deviations are stretched by sqrt(n / (n - 1)), since a mean of n
  drawn from n varies too little. It ends at `give_up_factor`, which stands for "at least".

  Args:
    rows: f64[1 + R, n], the measurement and its draws.

  Holds: on simulated lattices (5 batch sizes; 4, 6 or 10 seeds; noise of 5, 15 or 30 % in the steps; 300 of each) it holds the regret to
    expect in 90 to 100 % of cases for a mean over all pairs, and in 80 to 100 % for a single pair: the fewest where noise is small and
    two rates are nearly tied for the best, so that a seed more or less decides between them.
  """
  num_seeds = weights.shape[1]
  means = (rows * weights).sum(axis=1) / weights.sum(axis=1)
  most = math.log(give_up_factor)
  value = float(means[0])
  stretch = math.sqrt(num_seeds / (num_seeds - 1))
  interval = percentiles(value, value + stretch * (means[1:] - value))
  low, high = min(interval.low, value), max(interval.high, value)
  return Interval(*(math.exp(min(max(x, -most), most)) for x in (value, low, high)))


def mean_regret(regrets: Regrets, rule: str, pairs: np.ndarray) -> tuple[Interval, int]:
  """Averages the regret of a rule geometrically over the measured ones of some pairs, bool[S, S]; returns how many they are, too."""
  at = regrets.rules.index(rule)
  chosen = pairs & regrets.measured[at]
  if not chosen.any():
    return UNKNOWN, 0
  rows = regrets.held_out[:, :, at][..., chosen].mean(axis=-1)
  return interval_of(rows, regrets.weights, regrets.give_up_factor), int(chosen.sum())


class Worst(NamedTuple):
  """The worst regret of a rule: which of the given `Regrets` and which pair of batch sizes (by place) is worst, and how bad."""

  regret: Interval
  which: int
  pair: tuple[int, int]


def worst_regret(several: Sequence[Regrets], rule: str, masks: Sequence[np.ndarray]) -> Worst | None:
  """Finds the worst pair of a rule over one or several optimizers, without the bias of a maximum.

  Value and lower end: for each seed in turn the pair that is worst on the others is judged on it. That pair may not be the worst of all,
  so both err on the low side. Upper end: the largest upper end of any pair, which lies above the worst pair's regret whenever that
  pair's own interval holds it. `which` and `pair` name the pair whose own regret is largest: the one to look at.

  Args:
    masks: bool[S, S] for each of `several`: the pairs that count.

  Returns: None if no pair was measured.
  """
  at = several[0].rules.index(rule)
  chosen = [mask & regrets.measured[at] for regrets, mask in zip(several, masks, strict=True)]
  places = [(which, *pair) for which, mask in enumerate(chosen) for pair in np.argwhere(mask).tolist()]
  if not places:
    return None
  weights, most = several[0].weights, several[0].give_up_factor
  held_out, chosen_on = (
    np.concatenate([getattr(r, name)[:, :, at][..., mask] for r, mask in zip(several, chosen, strict=True)], axis=-1)
    for name in ("held_out", "chosen_on")
  )
  worst = chosen_on.argmax(axis=-1)
  rows = np.take_along_axis(held_out, worst[..., None], axis=-1)[..., 0]
  regret = interval_of(rows, weights, most)
  each = [interval_of(held_out[..., k], weights, most) for k in range(held_out.shape[-1])]
  which, *pair = places[int(np.argmax([interval.value for interval in each]))]
  high = max([regret.value, *(interval.high for interval in each)])
  return Worst(regret._replace(high=high), which, (pair[0], pair[1]))


def adam_regret(
  study: Mapping[str, Any], records: Sequence[Record], lattice: Lattice, regrets: Regrets, size: int
) -> Interval:
  """Returns the regret of Adam's own rule, which carries betas and epsilon too, from the reference batch size to another.

  Its trials were made at the reference's best rate over all seeds; they are compared with the best rate of `size` on the other seeds.
  """
  seeds = study["seeds"]
  steps = np.full(len(seeds), np.nan)
  missing = set(range(len(seeds)))
  for record in _trials(records, ADAM_KIND, lattice.optimizer).get(size, []):
    if record.trial["seed"] in seeds:
      row = seeds.index(record.trial["seed"])
      steps[row] = trial_steps(study, record)
      missing.discard(row)
  if missing or size not in lattice.batch_sizes:
    return UNKNOWN
  to = int(np.flatnonzero(lattice.batch_sizes == size)[0])
  log_steps, failed = clip_steps(steps, math.exp(lattice.log_limits[to]))
  seed, best = np.arange(len(seeds)), regrets.best[:, :, to]
  rows = compare(
    log_steps, failed, lattice.log_steps[seed, to, best], lattice.failed[seed, to, best], lattice.give_up_factor
  )
  return interval_of(rows, regrets.weights, regrets.give_up_factor)
