"""Examines a workload: does it keep to what the laboratory relies on, and if not, what is to be done?"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from bsjax.study.diagnosis import Case, Diagnosis, make_case
from bsjax.study.doctor_data import check_classes, check_data, check_duplicates, check_labels, check_metrics
from bsjax.study.doctor_loss import (
  check_arrays,
  check_batch_norm,
  check_example_loss,
  check_gradients,
  check_key,
  check_mean,
)
from bsjax.study.doctor_probes import check_gauss_newton, check_ghost_norms
from bsjax.study.doctor_program import check_compilations, check_memory
from bsjax.workloads import Workload
from bsjax.workloads.own_code import call_own

CHECKS: dict[str, Callable[[Case], Diagnosis]] = {
  "arrays": check_arrays,
  "mean": check_mean,
  "example_loss": check_example_loss,
  "gradients": check_gradients,
  "key": check_key,
  "batch_norm": check_batch_norm,
  "data": check_data,
  "duplicates": check_duplicates,
  "labels": check_labels,
  "classes": check_classes,
  "metrics": check_metrics,
  "ghost norms": check_ghost_norms,
  "Gauss-Newton": check_gauss_newton,
  "compilations": check_compilations,
  "memory": check_memory,
}
SMOKE = ("metrics", "ghost norms", "compilations")
"""An evaluation, a probe and training steps: whether a workload runs at all."""


def examine(
  workload: Workload, *, smoke: bool = False, on_check: Callable[[str], None] = lambda name: None
) -> Iterator[Diagnosis]:
  """Makes all checks, one after the other, and yields what each finds; nothing is written.

  Args:
    smoke: makes those of `SMOKE` only.
    on_check: called with the name of each check before it is made.

  Holds: whatever a check raises becomes its diagnosis, and the others are made all the same. If no initial parameters or no training
  loss can be computed at all, that is the only one.
  """
  on_check("train_loss")
  try:
    case = call_own("train_loss", make_case, workload)
  except ValueError as error:
    yield Diagnosis("train_loss", "fix", f"cannot be computed: {error}")
    return
  for name in checks_of(smoke):
    on_check(name)
    try:
      yield call_own("it", CHECKS[name], case)
    except ValueError as error:
      yield Diagnosis(name, "fix", f"cannot be checked: {error}")


def checks_of(smoke: bool) -> list[str]:
  """Names the checks to be made, in order."""
  return [name for name in CHECKS if name in SMOKE or not smoke]


def examine_aloud(workload: Workload, *, smoke: bool = False) -> list[Diagnosis]:
  """Makes the checks and prints a line for each as soon as it is found, below a bar of progress on a terminal."""
  found = []
  with tqdm(
    total=len(checks_of(smoke)), leave=False, disable=None
  ) as bar:  # None: off where standard error is no terminal
    for diagnosis in examine(workload, smoke=smoke, on_check=bar.set_description_str):
      found.append(diagnosis)
      bar.write(str(diagnosis))
      sys.stdout.flush()
      bar.update()
  return found


def needs_fixing(diagnoses: Sequence[Diagnosis]) -> bool:
  """Tells whether anything is to be fixed."""
  return any(diagnosis.status == "fix" for diagnosis in diagnoses)


def as_json(diagnoses: Sequence[Diagnosis]) -> list[dict[str, Any]]:
  """Makes diagnoses strict JSON: a number that is not finite becomes null."""
  finite = lambda value: value if abs(value) < float("inf") else None  # noqa: E731
  return [d._asdict() | {"numbers": {name: finite(value) for name, value in d.numbers.items()}} for d in diagnoses]
