"""The judge of the estimators of gradient noise: do the cheap ones agree with the exact one?"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from bsjax.analysis.claim import Finding, Verdict, columns, every, in_words, inside, judged, unjudged
from bsjax.analysis.claims_gradient_noise import ALONG, number_or_nan
from bsjax.analysis.fits import CONFIDENCE, Interval
from bsjax.analysis.selection import of_kind, probe_rows
from bsjax.records import Record

ROUNDING = 1e-5
"""Two ways to sum the same float32 numbers, relative to what is summed."""
AGREEMENT_LEVEL = 0.01
"""Chance of calling estimators that agree different, over all tests together."""
LEVEL_TOLERANCE = 0.25
"""Two estimates within a quarter of each other ask for the same batch size, where batch sizes are powers of two."""

ESTIMATORS = unjudged(
  "estimators_agree",
  statement="The cheap estimators of gradient noise agree with the exact per-example one",
  source="McCandlish et al. (2018), Eq. A.2; Gray et al. (2024)",
  expected="1",
  unit="sum of estimates / sum of exact values, the one farthest from 1",
)
QUANTITIES = ("grad_cov_trace", "grad_sq_norm")
SAMPLED_ROUTES = ("microbatch", "device")


def judge_estimators_agree(study: dict, records: Sequence[Record]) -> Finding:
  """Judges whether tr(Sigma) and |G|^2 by the routes "ghost", "microbatch" and "device" equal those by "exact".

  All routes look at the same examples with the same parameters. "ghost" differs by rounding only. Each of the other two draws batches,
  and says with a standard error how far that takes it from "exact": z = (estimate - exact) / error. The draws of two checkpoints are
  taken to be independent.

  Rule: fails if a ghost value is off by more than `ROUNDING`, relative to the value and, for |G|^2, to what bias correction took off
  it; or if for one of the sampled routes and quantities the sum of z^2 over all checkpoints exceeds what chi-square allows at
  `AGREEMENT_LEVEL` divided by the number of these tests (Bonferroni). Holds if it does not fail and each sum of estimates over the sum of
  exact values is known to lie within 1 +- `LEVEL_TOLERANCE`: estimators too noisy to disagree have not been shown to agree. Else
  inconclusive. Needs "ghost" and one of the sampled routes; the reading names one that was not measured, as "device" is not on a
  single device.

  Series, one entry for each checkpoint, route but "exact", and quantity: route, quantity, step, seed, value, exact, sem
  (NaN for ghost), z (NaN for ghost), relative_error.
  """
  del study
  rows = []
  for record in of_kind(records, ALONG):
    routes = probe_rows(record, "route")
    exact = {row["step"]: row for row in routes if row["route"] == "exact"}
    for row in routes:
      reference = exact.get(row["step"])
      if row["route"] == "exact" or reference is None:
        continue
      for name in QUANTITIES:
        value, truth = number_or_nan(row.get(name)), number_or_nan(reference.get(name))
        sem = number_or_nan(row.get(f"{name}_sem"))
        if not (math.isfinite(value) and math.isfinite(truth)):
          continue
        sampled = row["route"] in SAMPLED_ROUTES
        scale = abs(truth) + (exact_bias(reference) if name == "grad_sq_norm" else 0.0)
        rows.append(
          (
            row["route"],
            name,
            row["step"],
            record.trial["seed"],
            value,
            truth,
            sem if sampled else math.nan,
            (value - truth) / sem if sampled and sem > 0 else math.nan,
            abs(value - truth) / scale if value != truth else 0.0,
          )
        )
  series = columns("route quantity step seed value exact sem z relative_error", rows)
  pairs = [(route, name) for route in SAMPLED_ROUTES for name in QUANTITIES]
  levels: dict[tuple[str, str], Interval] = {}
  chances: dict[tuple[str, str], float] = {}
  for route, name in pairs:
    at = (series["route"] == route) & (series["quantity"] == name) & np.isfinite(_floats(series["z"]))
    if at.any():
      z, values, truths, sems = (_floats(series[key][at]) for key in ("z", "value", "exact", "sem"))
      level = float(values.sum() / truths.sum())
      half = float(stats.norm.ppf((1 + CONFIDENCE) / 2) * np.linalg.norm(sems) / abs(truths.sum()))
      levels[route, name] = Interval(level, level - half, level + half)
      chances[route, name] = float(stats.chi2.sf(z @ z, len(z)))
  ghost = _floats(series["relative_error"][series["route"] == "ghost"])
  if not levels or not len(ghost):
    missing = "sampled" if not levels else "ghost"
    return Finding(
      ESTIMATORS,
      series,
      f"No checkpoint has both an exact and a {missing} estimate of the gradient noise. One with all four routes would decide.",
    )
  same: dict[tuple[str, str], Verdict] = {
    pair: "fails" if p < AGREEMENT_LEVEL / len(chances) else "holds" for pair, p in chances.items()
  }
  rounding: Verdict = "holds" if ghost.max() <= ROUNDING else "fails"
  precise: Verdict = (
    "holds"
    if all(inside(level, 1 - LEVEL_TOLERANCE, 1 + LEVEL_TOLERANCE) == "holds" for level in levels.values())
    else "inconclusive"
  )
  verdict = every(rounding, *same.values(), precise)
  farthest = max(levels, key=lambda pair: (same[pair] == "fails", max(abs(end - 1) for end in levels[pair][1:])))
  word = {"grad_cov_trace": "tr(Sigma)", "grad_sq_norm": "|G|^2"}[farthest[1]]
  least = min(chances, key=lambda pair: chances[pair])
  reading = (
    f"The ghost route is within {ghost.max():.1g} of the exact one, and {word} by the {farthest[0]} route is "
    f"{in_words(levels[farthest])} times the exact one. The sampled routes scatter about it "
    + (
      "as their standard errors say"
      if "fails" not in same.values()
      else f"by more than their standard errors allow, by the {least[0]} route most"
    )
    + f" (chi-square, smallest p = {chances[least]:.2g} in {len(chances)} tests)"
    + "".join(
      f"; the {route} route was not measured" for route in SAMPLED_ROUTES if route not in {pair[0] for pair in levels}
    )
    + "."
  )
  return Finding(judged(ESTIMATORS, levels[farthest], n=len(series["z"]), verdict=verdict), series, reading)


def exact_bias(row: dict) -> float:
  """Returns tr(Sigma)/N, which is taken off the data set's |G|^2: the difference is rounded relative to both, however small it is."""
  return float(row["grad_cov_trace"] / row["num_examples"])


def _floats(array: np.ndarray) -> np.ndarray:
  return np.asarray(array, float)
