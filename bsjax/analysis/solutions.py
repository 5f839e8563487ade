"""Solutions of the study of sharp minima: what was measured where each trial ended, and what may be used of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bsjax.analysis.claim import columns
from bsjax.analysis.claims_gradient_noise import number_or_nan
from bsjax.analysis.claims_training import MAX_RESIDUAL
from bsjax.analysis.selection import batch_size, is_number, of_kind, probe_rows
from bsjax.records import Record

SOLUTION_KIND = "solution"
PHASES = {"level": "at equal training loss", "budget": "at equal epochs"}
"""The two cuts of every trial, and what they hold equal between batch sizes."""
MEASURE_LABELS = {
  "top_eigenvalue": "largest Hessian eigenvalue",
  "bottom_eigenvalue": "smallest Hessian eigenvalue",
  "trace": "Hessian trace",
  "gauss_newton_top": "largest Gauss-Newton eigenvalue",
  "fisher_top": "largest Fisher eigenvalue",
  "preconditioned_top": "largest preconditioned eigenvalue",
  "keskar_1e-3": "Keskar at ε = 0.001",
  "keskar_5e-4": "Keskar at ε = 0.0005",
  "keskar_subspace_1e-3": "Keskar in a subspace at ε = 0.001",
  "keskar_subspace_5e-4": "Keskar in a subspace at ε = 0.0005",
  "sam": "SAM",
  "adaptive_sam": "adaptive SAM",
  "batch_sharpness": "batch sharpness",
  "gradient_curvature": "curvature along the gradient",
  "average": "average sharpness",
  "adaptive_average": "adaptive average sharpness",
}
"""What the report and the figures call each measure."""
BATCH_NORM_WORDS = {
  "none": "no batch norm",
  "running": "batch norm: running statistics",
  "batch": "batch norm: statistics of the batch",
  "ghost": "batch norm: statistics of ghost batches",
}
NO_FLATNESS = ("bottom_eigenvalue",)
"""Measured, but no measure of flatness: negative wherever training stopped short of a minimum, it tells how far that is, and it has no
logarithm."""
MAX_RELATIVE_SEM = 0.25
"""Sampling error beyond this part of a value rules it out: up to here it lowers the mean logarithm by at most 0.25^2 / 2 = 3 %. Smaller
errors need no weights: they are in the scatter that the intervals come from."""


def measure_label(measure: str) -> str:
  """Returns what a reader calls a measure; one without a label keeps its name."""
  return MEASURE_LABELS.get(measure, measure)


def judged_measures(study: Mapping) -> list[str]:
  """Returns the measures of flatness in the study's order."""
  return [measure for measure in study.get("measures", ()) if measure not in NO_FLATNESS]


def reliable(row: Mapping) -> bool:
  """Tells whether a row of probe "measure" holds a number that is known well enough, whatever its sign.

  A Lanczos residual may be `MAX_RESIDUAL` of the value, a standard error `MAX_RELATIVE_SEM`; a row of neither kind has no error to state.
  """
  value, error = row.get("value"), row.get("error")
  if not is_number(value):
    return False
  most = {"residual": MAX_RESIDUAL, "sem": MAX_RELATIVE_SEM}.get(row.get("error_kind") or "")
  return most is None or (is_number(error) and error <= most * abs(value))


class Solution(NamedTuple):
  """Where one trial ended: how it was trained, what the test set says of it, and the last row of each measure."""

  phase: str
  batch_size: int
  rate_part: float
  seed: int
  train_loss: float
  test_error: float
  test_loss: float
  measures: dict[str, dict]

  @property
  def setting(self) -> tuple[int, float]:
    """What the seeds of one cell share."""
    return self.batch_size, self.rate_part


def read_solutions(records: Iterable[Record]) -> list[Solution]:
  """Reads the complete solutions, ordered by phase, batch size, rate and seed."""
  found = []
  for record in of_kind(records, SOLUTION_KIND):
    test = [{}, *probe_rows(record, "test")][-1]
    accuracy = number_or_nan(test.get("test_accuracy"))
    found.append(
      Solution(
        record.trial["phase"],
        batch_size(record),
        float(record.trial["rate_part"]),
        record.trial["seed"],
        number_or_nan(test.get("train_loss")),
        1 - accuracy,
        number_or_nan(test.get("test_loss")),
        {row["measure"]: row for row in probe_rows(record, "measure")},
      )
    )
  return sorted(found, key=lambda s: (list(PHASES).index(s.phase), *s[1:4]))


def measurements(study: Mapping, solutions: Iterable[Solution], *, logarithm: bool) -> dict[str, np.ndarray]:
  """Lists every measurement; `used` tells which enter: reliable ones, and positive ones if a logarithm is taken."""
  return columns(
    "phase measure batch_size rate_part seed value error grad_norm train_loss test_error test_loss used",
    [
      (
        s.phase,
        measure,
        s.batch_size,
        s.rate_part,
        s.seed,
        number_or_nan(row.get("value")),
        number_or_nan(row.get("error")),
        number_or_nan(row.get("grad_norm")),
        s.train_loss,
        s.test_error,
        s.test_loss,
        reliable(row) and (row["value"] > 0 or not logarithm),
      )
      for s in solutions
      for measure in judged_measures(study)
      if (row := s.measures.get(measure)) is not None
    ],
  )


def batch_norm_words(solutions: Iterable[Solution]) -> np.ndarray:
  """Says which statistics of batch norm the measures used; 0-d, empty if nothing was measured."""
  kinds = {row.get("batch_norm") for s in solutions for row in s.measures.values()}
  return np.asarray("; ".join(words for kind, words in BATCH_NORM_WORDS.items() if kind in kinds))


def trials_lost(records: Iterable[Record], solutions: Sequence[Solution]) -> list[str]:
  """Says how many trials diverged, and how many trained to the end of their epochs without reaching the training loss."""
  ended = {s[1:4] for s in solutions if s.phase == "budget"}
  short = len(ended - {s[1:4] for s in solutions if s.phase == "level"})
  diverged = sum(
    r.trial.get("kind") == SOLUTION_KIND and r.status.get("state") == "diverged" and r.trial.get("phase") == "budget"
    for r in records
  )
  remarks = []
  if short:
    remarks.append(f"{short} of {len(ended)} trials never reached the training loss at which the others are compared")
  if diverged:
    remarks.append(f"{diverged} {'trial' if diverged == 1 else 'trials'} diverged")
  return remarks


def spectra(records: Iterable[Record]) -> dict[str, np.ndarray]:
  """Lists the quadratures of the Hessian's spectrum where they were made, at equal training loss: one entry for each node.

  Returns: spectrum_batch_size, spectrum_rate_part, spectrum_draw, spectrum_node, spectrum_weight; the weights of a draw sum to 1.
  """
  rows = [
    (
      batch_size(record),
      float(record.trial["rate_part"]),
      row["draw"],
      *map(number_or_nan, (row["node"], row["weight"])),
    )
    for record in of_kind(records, SOLUTION_KIND)
    for row in probe_rows(record, "spectrum")
  ]
  names = ("batch_size", "rate_part", "draw", "node", "weight")
  return columns(" ".join(f"spectrum_{name}" for name in names), sorted(rows))
