"""What the page of the study of steps to result says: its answer, its tables, and what was held fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsjax.analysis import Finding, SweepRecords
from bsjax.analysis.claims_rate import throughput_points
from bsjax.analysis.claims_steps import Sweeps
from bsjax.analysis.finite_trials import check_final_seeds, tuning_bias
from bsjax.analysis.fits import Interval
from bsjax.analysis.steps_to_result import StepsToResult, matching_train_goal, steps_to_result, steps_to_train_loss
from bsjax.analysis.sweep_curves import fit_sweep, steps_by_batch_size
from bsjax.analysis.sweep_rates import rate_curve
from bsjax.records import Record
from bsjax.report.experiment import Page, Table
from bsjax.report.numbers import format_number
from bsjax.report.page import split_sizes

FIXED_HPARAMS = ("momentum", "weight_decay")


def steps_page(study: Mapping[str, Any], sweeps: Sweeps, findings: Sequence[Finding]) -> Page:
  """Compose the page from the study's summary, its sweeps and its findings."""
  tables = [_curve_table(sweeps), _rate_table(sweeps), *(_sizes_table(name, sweep) for name, sweep in sweeps.items())]
  trials = sum(record.trial["kind"] != "timing" for sweep in sweeps.values() for record in sweep.records)
  return Page(
    title=f"Steps to result: {study['workload']}",
    question=f"How many steps does {study['workload']} need at each batch size?",
    lead=f"{study['workload']} has {study['num_params']:,} parameters and was trained on {study['train_size']:,} examples of "
    f"{study['dataset']}, until {_goal(study['target'])}, at every batch size with hyperparameters of its own: {trials:,} trials with "
    f"{', '.join(sweeps)}.",
    answer=_answer(sweeps),
    tables=[table for table in tables if table.rows],
    fixed=_held_fixed(study, sweeps),
  )


def _goal(target: Mapping[str, Any]) -> str:
  side = "at least" if target["direction"] == "max" else "at most"
  return f"{target['metric'].replace('_', ' ')} was {side} {target['goal']:g}"


def _answer(sweeps: Sweeps) -> str:
  """Say for each optimizer how few steps are enough, and which batch sizes are worth their examples."""
  sentences = []
  for name, sweep in sweeps.items():
    curve = fit_sweep(steps_by_batch_size(*sweep))
    if not len(curve.batch_sizes):
      sentences.append(f"With {name} no batch size reached the target often enough.")
      continue
    fewest, sizes = int(np.argmin(curve.steps)), curve.batch_sizes
    least = f" and {curve.steps[fewest]:,.0f} at {sizes[fewest]:,}" if fewest else ", the fewest of all"
    until = curve.perfect_until.value if curve.fit.reason else curve.fit_perfect_until.value
    scaling = (
      f"no batch size tested takes over 20 % more examples, up to {sizes[-1]:,}"
      if not math.isfinite(until)
      else f"larger batches take no more than 20 % more examples up to about {format_number(until)}"
      if until > sizes[0]
      else f"even batch size {sizes[0]:,} takes over 20 % more examples than very small ones would"
    )
    sentences.append(f"With {name} it takes {curve.steps[0]:,.0f} steps at batch size {sizes[0]:,}{least}; {scaling}.")
  return " ".join(sentences)


def _triple(interval: Interval) -> Interval | None:
  return interval if math.isfinite(interval.value) else None


def _curve_table(sweeps: Sweeps) -> Table:
  """Give the numbers of the curve and what finitely many trials do to them, for each optimizer."""
  rows = []
  for name, (study, records) in sweeps.items():
    steps = steps_by_batch_size(study, records)
    curve = fit_sweep(steps)
    num_tuned = max((len(entry["space"]) for entry in study["sweep"].values()), default=1)
    bias = tuning_bias(steps, num_tuned=num_tuned)
    rows.append(
      (
        name,
        _triple(curve.fit.critical),
        _triple(curve.fit.s_min),
        _triple(curve.e_min),
        _triple(curve.perfect_until if curve.fit.reason else curve.fit_perfect_until),
        _triple(curve.max_useful),
        _triple(bias.gain),
        bias.remaining.high if math.isfinite(bias.remaining.high) else None,
      )
    )
  return Table(
    "The curve S = S_min (1 + B_crit / B) and where its regimes end: perfect scaling where the fit needs 20 % more examples than "
    "E_min (without a fit, than the smallest batch size), the plateau where steps are within 20 % of the fewest. Last, what finitely "
    "many trials cost: steps with half "
    "of the trials over steps with all, and a bound on the factor that any number of further trials would save.",
    (
      "Optimizer",
      "Critical batch size",
      "S_min (steps)",
      "E_min (examples)",
      "Perfect until",
      "Largest useful",
      "Half the trials",
      "More trials",
    ),
    rows,
  )


def _rate_table(sweeps: Sweeps) -> Table:
  """Compare the slope of the best rate with the rules."""
  rows = []
  for name, sweep in sweeps.items():
    curve = rate_curve(*sweep, effective=True)
    agrees = ", ".join(curve.agrees) or "none"
    if not curve.best_reason:
      rows.append((name, _triple(curve.best_slope), agrees, _triple(curve.width_slope)))
  return Table(
    "How the best rate grows with the batch size: exponent of B (constant rule 0, square root 0.5, linear 1), and that of the range of "
    "good "
    "rates. Rates are effective ones, learning rate / (1 - momentum).",
    ("Optimizer", "Best rate", "Rules within its interval", "Width of good rates"),
    rows,
  )


def _sizes_table(name: str, sweep: SweepRecords) -> Table:
  """List every batch size of one optimizer: steps by both rules, the best point, the trials."""
  study, records = sweep
  results = steps_to_result(study, records)
  goal = matching_train_goal(study, records)
  by_loss = {} if goal is None else {r.batch_size: r for r in steps_to_train_loss(study, records, goal=goal)}
  checks = {check.batch_size: check for check in check_final_seeds(study, records, results)}
  searched = sorted({name for entry in study["sweep"].values() for name in entry["space"]})
  seconds = _step_seconds(records)
  rows = []
  for r in results:
    check, loss = checks.get(r.batch_size), by_loss.get(r.batch_size)
    rows.append(
      (
        r.batch_size,
        r.steps if r.steps is not None else _miss(r),
        None if r.steps is None else r.steps * r.batch_size,
        None if r.steps is None or r.batch_size not in seconds else r.steps * seconds[r.batch_size],
        f"{100 * r.quantisation:.1f} %" if r.steps else None,
        None if check is None else check.reason or _triple(check.ratio),
        None if loss is None else loss.steps,
        *(r.hparams.get(key) for key in searched),
        ", ".join(f"{side} {key.replace('_', ' ')}" for key, side in r.edges.items()) or "none",
        f"{r.num_reached} / {r.counts.complete - r.num_reached} / {r.counts.incomplete} / {r.counts.infeasible}",
      )
    )
  loss_words = "" if goal is None else f" (at most {format_number(goal)}, smoothed)"
  return Table(
    f"{name}: the fewest steps to the target by Shallue's rule, the seconds that one trial alone takes for them here, how finely they "
    f"were looked for, what {len(study['final_seeds'])} fresh "
    f"seeds of the best trial "
    f"needed relative to it, and the fewest steps to a training loss{loss_words} by McCandlish's rule; the best trial's hyperparameters "
    f"and the edges it sits "
    "on; trials that reached the target / did not / were cut / diverged.",
    (
      "B",
      "Steps",
      "Examples",
      "Seconds",
      "Looked for every",
      "Fresh seeds / best",
      "Steps, training loss",
      *(key.replace("_", " ") for key in searched),
      "Edge",
      "Trials",
    ),
    rows,
  )


def _step_seconds(records: Sequence[Record]) -> dict[int, float]:
  """Return the median seconds of a step at each batch size that was timed."""
  found: dict[int, list[float]] = {}
  for size, _, _, per_step in throughput_points(records):
    found.setdefault(size, []).append(per_step)
  return {size: float(np.median(values)) for size, values in found.items()}


def _miss(result: StepsToResult) -> str:
  near = f", nearest {result.nearest:.4g}" if math.isfinite(result.nearest) else ""
  return f"{result.outcome}{near}"


def _held_fixed(study: Mapping[str, Any], sweeps: Sweeps) -> list[tuple[str, str]]:
  """Return what was the same in every trial, as names and sentences."""
  first = next(iter(sweeps.values())).study
  searched = {name for entry in first["sweep"].values() for name in entry["space"]}
  hparams = ", ".join(f"{name.replace('_', ' ')} {first[name]:g}" for name in FIXED_HPARAMS if name not in searched)
  warmup = (
    ""
    if first["warmup"] == "none"
    else f", {first['warmup']} warm-up over {first['warmup_fraction']:.0%} of the budget"
  )
  if first["half_life"]:
    hparams += f", beta2 forgets half in {first['half_life']:,g} examples"
  if first["microbatch_size"]:
    hparams += f", gradients accumulated over microbatches of {first['microbatch_size']}"
  rule = first["scaling_rule"] + (f" (noise scale {first['noise_scale']:,g})" if first["noise_scale"] else "")
  budgets = "; ".join(f"batch size {size}: {entry['num_steps']:,}" for size, entry in first["sweep"].items())
  return [
    ("Data", f"{study['dataset']}: {split_sizes(study)}"),
    ("Model", f"{study['workload']}, {study['num_params']:,} parameters"),
    ("Target", _goal(study["target"])),
    ("Hyperparameters", f"{hparams or 'all searched'}; {first['schedule']} schedule{warmup}"),
    (
      "Search",
      f"{first['num_trials']} quasi-random trials for each batch size, each with a seed of its own, over {', '.join(sorted(searched))}, "
      f"centred by the rule "
      f"{rule!r}; a space whose best trial sits on its edge is widened, with a quarter more trials, at most three times",
    ),
    ("Most steps", budgets),
    (
      "Early end",
      f"at the target; later trials at {first['give_up_factor']} times the fewest steps that earlier ones needed, which cannot change "
      f"the minimum",
    ),
    ("Fresh seeds", f"{len(first['final_seeds'])} of the best trial of every batch size"),
    (
      "Quality",
      f"{first['quality_trials']} trials of every batch size for the whole budget, from the fastest to the slowest that reached the "
      f"target, and the best of "
      "them at the fresh seeds"
      if first["quality_trials"]
      else "not measured",
    ),
  ]
