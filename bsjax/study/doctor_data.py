"""Whether data, labels and metrics are what evaluation takes them for."""

import functools
import hashlib

import jax
import numpy as np

from bsjax.data import Source
from bsjax.study.diagnosis import BATCH_SIZE, LEAST_BATCH_SIZE, Case, Diagnosis, listed
from bsjax.train import chunked, eval_chunk, evaluate
from bsjax.workloads import Workload

MOST_RECORDS = 4096
"""Examples that are looked at of a split that is read record by record: the first."""
MOST_EVALUATED, EVALUATED_FLOPS = 1024, 1e11
"""Examples of a split that are evaluated, at most: the first; fewer where their losses take more operations, some seconds of a CPU core."""
MOST_SHARED = 0.01
"""The share of an evaluation split that may be in the training set: well-known data sets have a few duplicates."""
LABEL, TOKENS = "label", "tokens"


@functools.lru_cache(maxsize=1)
def _splits(workload: Workload) -> dict[str, dict[str, np.ndarray]]:
  """Returns the arrays of each split by the part it plays, of a split on disk the first `MOST_RECORDS` examples."""
  roles = {"train": workload.train, "validation": workload.validation, "test": workload.test}
  return {
    role: dict((source if isinstance(source, Source) else source.first(MOST_RECORDS)).arrays)
    for role, source in roles.items()
  }


def _extent(workload: Workload) -> str:
  """Says how much was looked at where that is not all; to be put behind what was found."""
  on_disk = not all(isinstance(split, Source) for split in (workload.train, workload.validation, workload.test))
  return f" (looked at: the first {MOST_RECORDS:,} of each split)" if on_disk else ""


def _most_evaluated(case: Case) -> int:
  return int(min(MOST_EVALUATED, max(LEAST_BATCH_SIZE, EVALUATED_FLOPS / case.loss_flops)))


def check_data(case: Case) -> Diagnosis:
  """Compares arrays, shapes and dtypes of the splits, and looks for lengths that differ and numbers that are not finite."""
  workload, faults = case.workload, []
  splits = _splits(workload)
  wanted = {name: (array.shape[1:], array.dtype) for name, array in splits["train"].items()}
  for role, arrays in splits.items():
    if {name: (array.shape[1:], array.dtype) for name, array in arrays.items()} != wanted:
      told = {
        each: {name: f"{a.dtype}{list(a.shape[1:])}" for name, a in splits[each].items()} for each in ("train", role)
      }
      faults.append(f"{role} holds {told[role]}, train {told['train']}: make shapes and dtypes equal")
    if len(lengths := {len(array) for array in arrays.values()}) > 1:
      faults.append(f"the arrays of {role} hold {sorted(lengths)} examples: give each of them one row for each example")
    broken = [name for name, a in arrays.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
    if broken:
      faults.append(f"{role} has numbers in {listed(broken)} that are not finite: clean them before training")
  too_large = [str(size) for size in workload.preset.batch_sizes if size > len(workload.train)]
  if too_large:
    faults.append(
      f"preset.batch_sizes has {listed(too_large)}, more than the {len(workload.train)} training examples: leave them out"
    )
  numbers = {role: float(len(getattr(workload, role))) for role in splits}
  if faults:
    return Diagnosis("data", "fix", "; ".join(faults), numbers)
  shapes = ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in wanted.items())
  sizes = " / ".join(f"{int(size):,}" for size in numbers.values())
  return Diagnosis(
    "data", "ok", f"{sizes} examples to train, validate, test; {shapes}; all finite{_extent(workload)}", numbers
  )


def check_duplicates(case: Case) -> Diagnosis:
  """Counts the examples of validation and test that are in the training set too, whatever their label."""

  def digests(arrays: dict[str, np.ndarray]) -> list[bytes]:
    columns = [
      np.ascontiguousarray(array) for name, array in sorted(arrays.items()) if name != LABEL or len(arrays) == 1
    ]
    return [hashlib.sha256(b"".join(row.tobytes() for row in rows)).digest() for rows in zip(*columns, strict=True)]

  found = {role: digests(arrays) for role, arrays in _splits(case.workload).items()}
  trained = set(found["train"])
  shared = {role: sum(digest in trained for digest in found[role]) for role in ("validation", "test")}
  numbers = {f"{role}_in_train": float(count) for role, count in shared.items()}
  told = " and ".join(f"{count} of {len(found[role]):,} examples of {role}" for role, count in shared.items())
  if any(count > MOST_SHARED * len(found[role]) for role, count in shared.items()):
    return Diagnosis(
      "duplicates", "fix", f"{told} are in train too: split again, generalisation cannot be judged", numbers
    )
  if any(shared.values()):
    return Diagnosis("duplicates", "note", f"{told} are in train too", numbers)
  return Diagnosis("duplicates", "ok", f"no example of validation or test is in train{_extent(case.workload)}", numbers)


def check_labels(case: Case) -> Diagnosis:
  """Compares labels, or tokens of a text, with the number of logits, and says what the loss gives outside of them."""
  workload, splits = case.workload, _splits(case.workload)
  name = TOKENS if workload.tokens_per_example and LABEL not in case.batch else LABEL
  things = "tokens" if name == TOKENS else "labels"
  if workload.example_outputs is None or name not in case.batch:
    return _check_losses(case)
  example = jax.tree.map(lambda array: array[0], case.batch)
  outputs, label = jax.eval_shape(workload.example_outputs, *case.variables, example), np.asarray(example[name])
  predicted = label[1:] if name == TOKENS else label
  if label.dtype.kind not in "iu" or outputs.shape[:-1] != predicted.shape or not outputs.shape:
    return Diagnosis(
      "labels",
      "note",
      f"not checked: outputs {list(outputs.shape)} are no logits of {things} {label.dtype}{list(label.shape)}",
    )
  classes = outputs.shape[-1]
  outside = {
    role: np.flatnonzero(((a[name] < 0) | (a[name] >= classes)).reshape(len(a[name]), -1).any(axis=1))
    for role, a in splits.items()
  }
  numbers = {"classes": float(classes)} | {f"{role}_outside": float(len(at)) for role, at in outside.items()}
  wrong = [role for role, at in outside.items() if len(at)]
  if not wrong:
    return Diagnosis("labels", "ok", f"all within 0 to {classes - 1}{_extent(workload)}", numbers)
  role, at = wrong[0], int(outside[wrong[0]][0])
  loss = float(workload.example_loss(*case.variables, {name: array[at] for name, array in splits[role].items()}))
  message = (
    f"{sum(map(len, outside.values()))} examples have {things} outside 0 to {classes - 1}, first {role} example "
    f"{at} with {splits[role][name][at]}; example_loss gives {loss:.4g} there and raises nothing: mend the {things}, or add logits"
  )
  return Diagnosis("labels", "fix", message, numbers)


def _check_losses(case: Case) -> Diagnosis:
  """Looks for examples without a finite loss, which is what most losses give for a label that they do not know."""
  loss_of = functools.partial(case.workload.example_loss, *case.variables)
  losses = jax.jit(functools.partial(jax.lax.map, loss_of, batch_size=BATCH_SIZE))
  for role, arrays in _splits(case.workload).items():
    first = {name: array[: _most_evaluated(case)] for name, array in arrays.items()}
    at = np.flatnonzero(~np.isfinite(losses(first)))
    if len(at):
      example = {name: array[at[0]] for name, array in first.items()}
      label = f", whose {LABEL} is {example[LABEL]}" if LABEL in example else ""
      message = f"{len(at)} examples of {role} have no finite loss at initialisation, first example {at[0]}{label}: mend them, or the loss"
      return Diagnosis("labels", "fix", message, {f"{role}_not_finite": float(len(at))})
  return Diagnosis(
    "labels",
    "note",
    f"each loss is finite, of the first {_most_evaluated(case):,} of each split; the classes are known only with example_outputs",
  )


def check_classes(case: Case) -> Diagnosis:
  """Counts the classes of the training set: what always guessing the largest would score."""
  splits = _splits(case.workload)
  label = splits["train"].get(LABEL)
  if label is None or label.dtype.kind not in "iu" or label.ndim != 1:
    return Diagnosis("classes", "note", f"not counted: there is no whole number {LABEL!r} for each example")
  classes, counts = np.unique(label, return_counts=True)
  numbers = {"classes": float(len(classes)), "least": float(counts.min()), "most": float(counts.max())}
  unseen = sorted(
    {int(c) for role in ("validation", "test") for c in np.unique(splits[role][LABEL])} - set(classes.tolist())
  )
  more = f"; labels {listed([str(c) for c in unseen])} are never trained on" if unseen else ""
  told = (
    f"{len(classes)} in train, of {counts.min():,} to {counts.max():,} examples; always guessing the largest scores"
  )
  return Diagnosis(
    "classes",
    "note" if unseen else "ok",
    f"{told} {counts.max() / len(label):.3g}{more}{_extent(case.workload)}",
    numbers,
  )


def check_metrics(case: Case) -> Diagnosis:
  """Evaluates `example_metrics` at the initial parameters: finite scalars, and the target not reached yet."""
  workload = case.workload
  metric, data = workload.target.metric.removeprefix("validation_"), workload.validation.first(_most_evaluated(case))
  example = jax.tree.map(lambda array: array[0], case.batch)
  shapes = {
    name: value.shape for name, value in jax.eval_shape(workload.example_metrics, *case.variables, example).items()
  }
  wrong = [f"{name} {list(shape)}" for name, shape in shapes.items() if shape != ()]
  if wrong:
    return Diagnosis(
      "metrics", "fix", f"{listed(wrong)} of one example: return scalars, evaluation averages them over examples"
    )
  missing = [name for name in ("loss", metric) if name not in shapes]
  if missing:
    return Diagnosis(
      "metrics", "fix", f"example_metrics returns no {listed(missing)}, only {listed(sorted(shapes))}: add it"
    )
  chunks = chunked(data.arrays, eval_chunk(workload.example_metrics, *case.variables, data.spec))
  averages = jax.jit(functools.partial(evaluate, workload.example_metrics))(*case.variables, chunks)
  numbers = {f"validation_{name}": float(value) for name, value in averages.items()}
  told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
  if not np.isfinite(list(numbers.values())).all():
    return Diagnosis(
      "metrics", "fix", f"not finite at initialisation: {told}; no trial would count as anything but diverged", numbers
    )
  goal = f"{workload.target.metric} {'>=' if workload.target.direction == 'max' else '<='} {workload.target.goal:g}"
  if workload.target.is_reached(numbers[f"validation_{metric}"]):
    return Diagnosis(
      "metrics",
      "fix",
      f"{told}: the target {goal} is reached before training; raise the goal, or turn its direction",
      numbers,
    )
  return Diagnosis("metrics", "ok", f"{told} at initialisation, on {len(data):,} examples; target {goal}", numbers)
