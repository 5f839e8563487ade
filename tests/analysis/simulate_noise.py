"""Records of gradient noise with a known answer: the truth of every row is a formula, its sampling error drawn from a seed."""

import math
import zlib

import numpy as np

from bsjax.records import Record

NUM_EXAMPLES = 1024
STEPS = (0, 1, 2, 4, 8, 16, 32, 48, 52, 56, 60, 64)
SETTINGS = ((4, 0.02), (4, 0.08), (32, 0.1))
SEEDS = (0, 1, 2)
STUDY = {"workload": "simulated", "train_size": NUM_EXAMPLES}
LAYERS = {"Dense_0": (0.7, 0.5), "Dense_1": (0.25, 0.4), "block_0/LayerNorm_0": (0.05, 0.1)}
"""Parts of the total tr(Sigma) and |G|^2 in each layer."""


def noise_row(step, *, trace, sq_norm, sem, rng, group="all", num_examples=NUM_EXAMPLES):
  """Returns a row as `flat_row` gives it: |G|^2 measured with standard error `sem`, tr(Sigma) as good as exactly."""
  dataset = abs(sq_norm + trace / num_examples + sem * rng.normal())
  measured = dataset - trace / num_examples
  identified = measured > 1.96 * sem
  row = {"probe": "noise", "step": step, "group": group, "num_examples": num_examples, "loss": 1.0}
  row |= {"grad_cov_trace": trace, "grad_cov_trace_ci_low": 0.99 * trace, "grad_cov_trace_ci_high": 1.01 * trace}
  row |= {"grad_sq_norm": measured, "grad_sq_norm_ci_low": measured - 1.96 * sem}
  row |= {"grad_sq_norm_ci_high": measured + 1.96 * sem}
  ends = (
    (trace / measured, trace / (measured + 1.96 * sem), trace / (measured - 1.96 * sem)) if identified else (None,) * 3
  )
  row |= dict(zip(("noise_scale", "noise_scale_ci_low", "noise_scale_ci_high"), ends, strict=True))
  row |= {"signal_to_noise": measured / trace, "signal_to_noise_ci_low": None, "signal_to_noise_ci_high": None}
  row |= {"verdict": "identified" if identified else "unidentifiable", "examples_needed": None if identified else 10**6}
  return row | {"dataset_grad_sq_norm": dataset, "dataset_noise_scale": trace / dataset}


def record(kind, size, rate, seed, probes, *, num_steps=STEPS[-1], state="complete", **provenance) -> Record:
  name = "-".join(map(str, (kind, *provenance.values(), f"{size:05d}", f"{rate:.5f}", f"{seed:03d}")))
  trial = {"id": name, "kind": kind, "config": {"batch_size": size, "num_steps": num_steps}, "seed": seed}
  trial |= {"hparams": {"learning_rate": rate}, **provenance}
  return Record(name, trial, {"state": state}, [], probes)


def _rng(*parts):
  return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def along_trials(
  *,
  grows=lambda size, rate: 30.0,
  sem=0.01,
  seeds=SEEDS,
  settings=SETTINGS,
  seed_spread=0.1,
  layers=True,
  norm_power=1.0,
  routes=True,
  ghost_error=1e-7,
  bias=1.0,
  honest=1.0,
  route_sem=1.0,
) -> list[Record]:
  """Returns trials whose noise scale goes from 10 at step 0 to 10 `grows` at the end, as a power of 1 + step.

  Args:
    grows: factor of each setting.
    sem: standard error of |G|^2, relative to |G|^2 times the growth so far (a gradient that shrinks is harder to see).
    norm_power: the normalisation layers' noise scale is 2 (total)^(1 / norm_power).
    bias: what the "device" route's tr(Sigma) is multiplied with; `honest`: true over stated standard error of both sampled routes;
      `route_sem` multiplies both.
  """
  trials = []
  for size, rate in settings:
    for seed in seeds:
      rng = _rng(size, rate, seed)
      wobble = math.exp(seed_spread * rng.normal())
      rows = []
      for step in STEPS:
        growth = (grows(size, rate) * wobble) ** (math.log1p(step) / math.log1p(STEPS[-1]))
        scale, trace = 10 * growth, 5.0 / math.sqrt(growth)
        error = sem * growth * trace / scale
        rows.append(noise_row(step, trace=trace, sq_norm=trace / scale, sem=error, rng=rng))
        for name, (of_trace, of_sq_norm) in LAYERS.items() if layers else ():
          share, part = of_trace * trace, of_sq_norm * trace / scale
          if "Norm" in name:
            part = share / (2 * scale ** (1 / norm_power))
          rows.append(noise_row(step, trace=share, sq_norm=part, sem=error * of_sq_norm, rng=rng, group=name))
        rows += _form_rows(step, scale, size == settings[0][0] and step == STEPS[-1])
        if routes and step in STEPS[::4]:
          rows += _route_rows(step, trace, trace / scale, rng, ghost_error, bias, honest, route_sem)
      trials.append(record("along", size, rate, seed, rows))
  return trials


def _form_rows(step, scale, refused):
  rows = []
  for name, factor in (("hessian", 0.3), ("adam", 1.5)):
    value = factor * scale
    row = {"probe": f"{name}_noise", "step": step, "verdict": "unidentifiable" if refused else "identified"}
    ends = (None,) * 3 if refused else (value, 0.9 * value, 1.1 * value)
    fields = (f"{name}_noise_scale", f"{name}_noise_scale_ci_low", f"{name}_noise_scale_ci_high")
    rows.append(row | dict(zip(fields, ends, strict=True)) | {f"{name}_dataset_noise_scale": value})
  return rows


def _route_rows(step, trace, sq_norm, rng, ghost_error, bias, honest, route_sem):
  sems = {"grad_cov_trace": 0.04 * route_sem * trace, "grad_sq_norm": 0.05 * route_sem * sq_norm}
  truth = {"grad_cov_trace": trace, "grad_sq_norm": sq_norm}
  exact = {
    "probe": "route",
    "step": step,
    "route": "exact",
    **truth,
    "grad_cov_trace_sem": 0.0,
    "num_examples": NUM_EXAMPLES,
  }
  rows = [exact | {"grad_sq_norm_sem": 0.0}]
  rows.append(rows[0] | {"route": "ghost"} | {name: value * (1 + ghost_error) for name, value in truth.items()})
  for route in ("microbatch", "device"):
    row = {"probe": "route", "step": step, "route": route}
    for name, value in truth.items():
      shift = bias if (route, name) == ("device", "grad_cov_trace") else 1.0
      row |= {name: shift * value + honest * sems[name] * rng.normal(), f"{name}_sem": sems[name]}
    rows.append(row)
  return rows


BASE = (16, 0.1)
BRANCHES = {
  "unchanged": (16, 0.1),
  "B x 16": (256, 0.1),
  "rate / 16": (16, 0.1 / 16),
  "rate / 4 and B x 4": (64, 0.1 / 4),
  "rate / 4 and B / 4": (4, 0.1 / 4),
}
STRETCH_EXAMPLES = 16 * 1024


def temperature_trials(*, power=1.0, returns=True, seeds=range(4), spread=0.1, branches=BRANCHES) -> list[Record]:
  """Returns the temperature test's stretches: the noise scale goes as temperature^(-`power`) and relaxes in a tenth of a stretch.

  Args:
    returns: whether the noise scale comes back after the change.
    spread: standard deviation over seeds of log(noise scale), in each stretch by itself.
  """
  base_temperature = BASE[1] / BASE[0]

  def stretch(branch, phase, seed, size, rate, start, end, before):
    rng = _rng(branch, phase, seed)
    wobble, rows = math.exp(spread * rng.normal()), []
    num_steps = STRETCH_EXAMPLES // size
    for part in (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1):
      settled = 1 - math.exp(-10 * part)
      scale = wobble * math.exp((1 - settled) * math.log(start) + settled * math.log(end))
      # `noise_row` makes |G|^2 of the data set from that of the distribution: take the difference off first.
      sq_norm = 1 / scale - 1 / NUM_EXAMPLES
      rows.append(noise_row(int(part * num_steps), trace=1.0, sq_norm=sq_norm, sem=0.0, rng=rng))
    more = {"branch": branch, "phase": phase, "examples_before": before}
    return record("temperature", size, rate, seed, rows, num_steps=num_steps, **more)

  trials = []
  for seed in seeds:
    trials.append(stretch("unchanged", "before", seed, *BASE, 5.0, 40.0, 0))
    for branch, (size, rate) in branches.items():
      high = 40.0 * (base_temperature / (rate / size)) ** power
      trials.append(stretch(branch, "during", seed, size, rate, 40.0, high, STRETCH_EXAMPLES))
      trials.append(stretch(branch, "after", seed, *BASE, high, 40.0 if returns else high, 2 * STRETCH_EXAMPLES))
  return trials


def judge(function, records):
  """Lets a judge decide on records of the simulated study."""
  return function(STUDY, records)
