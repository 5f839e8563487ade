"""Whether the loss is what training and probes take it for: a mean over examples, a pure function, with a gradient everywhere."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.probes.leaves import leaf_names
from bsjax.study.diagnosis import NOT_FINITE, Case, Diagnosis, compare, join, listed, nudged
from bsjax.types import Array, Batch, Key, Params, Variables

SEEDS = 3
TINY = 1e-6
"""A gradient so much smaller than the largest of any array may be nothing but float32 rounding."""


def check_arrays(case: Case) -> Diagnosis:
  """Checks that parameters are floats, and that training keeps the structure, shapes and dtypes of the model state."""
  name = "arrays"
  params, model_state = case.variables
  leaves = dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))
  numbers = {"num_params": sum(leaf.size for leaf in leaves.values()), "num_arrays": len(leaves)}
  if not leaves:
    return Diagnosis(name, "fix", "params hold no arrays: init must return Variables(params, model_state)")
  whole = [leaf for leaf, array in leaves.items() if not jnp.issubdtype(array.dtype, jnp.floating)]
  if whole:
    return Diagnosis(
      name, "fix", f"{listed(whole)} of params hold no floats: keep them out of params, they have no gradient", numbers
    )
  after: Any = jax.eval_shape(case.workload.train_loss, params, model_state, case.batch, case.key)[1]
  kept: Any = jax.tree.structure(model_state)
  if jax.tree.structure(after) != kept:
    return Diagnosis(
      name, "fix", "train_loss returns a model_state with other entries than init does: return all of it, and no more"
    )
  changed = [
    f"{leaf} {old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}"
    for leaf, old, new in zip(
      leaf_names(model_state), jax.tree.leaves(model_state), jax.tree.leaves(after), strict=True
    )
    if (old.shape, old.dtype) != (new.shape, new.dtype)
  ]
  if changed:
    return Diagnosis(
      name, "fix", f"train_loss changes {listed(changed)} of model_state: shapes and dtypes must stay", numbers
    )
  return Diagnosis(
    name, "ok", f"{numbers['num_params']:,} parameters in {len(leaves)} arrays; model_state keeps its shapes", numbers
  )


def check_mean(case: Case) -> Diagnosis:
  """Compares the training loss of a batch with that of the same batch given twice."""
  once, twice = case.train_losses(case.batch), case.train_losses(join(case.batch, case.batch))
  found = compare(once, twice, case.rounding)
  numbers = {"loss": found.first, "loss_twice": found.second, "difference": found.difference}
  if not np.isfinite(found.first):
    return _not_finite("mean", "train_loss", found.first)
  if found.agrees:
    return Diagnosis("mean", "ok", f"a batch given twice changes the loss by {found.difference:.1g} of it", numbers)
  message = (
    f"a batch given twice changes train_loss from {found.first:.4g} to {found.second:.4g}: make it a mean over examples, jnp.mean "
    "instead of jnp.sum; penalties are added once, not for each example"
  )
  return Diagnosis("mean", "fix", message, numbers)


def check_example_loss(case: Case) -> Diagnosis:
  """Compares the training loss with the mean of `example_loss`, where both must be the same."""
  name, workload = "example_loss", case.workload
  if workload.batch_norm != "none" or case.uses_key:
    why = "batch norm" if workload.batch_norm != "none" else "randomness"
    return Diagnosis(
      name, "note", f"not compared with train_loss, which has {why} in training; probes see example_loss"
    )
  losses = jax.jit(jax.vmap(workload.example_loss, (None, None, 0)))(*case.variables, case.batch)
  found = compare(case.train_losses(case.batch), [float(np.mean(np.asarray(losses, np.float64)))], case.rounding)
  numbers = {"train_loss": found.first, "mean_example_loss": found.second, "difference": found.difference}
  for loss, value in (("train_loss", found.first), ("the mean of example_loss", found.second)):
    if not np.isfinite(value):
      return _not_finite(name, loss, value)
  if found.agrees:
    return Diagnosis(name, "ok", f"train_loss is its mean, to {found.difference:.1g}", numbers)
  message = (
    f"train_loss is {found.first:.6g}, the mean of example_loss {found.second:.6g}: use mean_train_loss(example_loss)"
  )
  return Diagnosis(name, "fix", message, numbers)


def _not_finite(name: str, loss: str, value: float) -> Diagnosis:
  return Diagnosis(name, "fix", f"{loss} is {value} at initialisation: {NOT_FINITE}", {"loss": value})


def check_gradients(case: Case) -> Diagnosis:
  """Looks for gradients that are not finite, or zero for a whole parameter array, at the start of several seeds and beside it.

  Those of the training loss, and, at the initial parameters, whether those of `example_loss` are finite.
  """
  name, leaves = "gradients", leaf_names(case.variables.params)
  at_start, beside, of_examples = _largest_entries(case)

  def those(chosen: Any) -> list[str]:
    return [leaf for leaf, at in zip(leaves, chosen, strict=True) if at]

  small_at_start, small_beside = (
    np.asarray(found <= TINY * found.max(axis=1, keepdims=True)).all(axis=0) for found in (at_start, beside)
  )
  bad = those(~np.isfinite(at_start).all(axis=0))
  bad_in_probes = those(~np.isfinite(of_examples).all(axis=0))
  dead = those(((at_start == 0) & (beside == 0)).all(axis=0))
  rounding, stuck = those(small_at_start & small_beside), those(small_at_start & ~small_beside)
  numbers = {
    "seeds": SEEDS,
    "not_finite": len(bad or bad_in_probes),
    "zero": len(dead),
    "rounding": len(rounding),
    "stuck": len(stuck),
  }
  if bad or bad_in_probes:
    whose = "" if bad else " in example_loss"
    return Diagnosis(
      name, "fix", f"not finite at initialisation{whose}: {listed(bad or bad_in_probes)}; {NOT_FINITE}", numbers
    )
  if dead:
    message = f"zero: {listed(dead)}; the loss does not depend on them: use them, or leave them out of params"
    return Diagnosis(name, "fix", message, numbers)
  if rounding:
    message = f"finite; no more than rounding for {listed(rounding)}: as for a bias before batch norm"
    return Diagnosis(name, "note", message, numbers)
  if stuck:
    message = (
      f"finite; zero at initialisation for {listed(stuck)}, but not beside it: as behind a layer that starts at 0"
    )
    return Diagnosis(name, "note", message, numbers)
  return Diagnosis(name, "ok", f"finite and not zero for all {len(leaves)} arrays, at {SEEDS} seeds", numbers)


def _largest_entries(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns max |dL/dp| of every parameter array p, f[seeds, arrays]: at the initial parameters of some seeds, and at those with noise,
  of the training loss; at the former, of the mean of `example_loss`."""
  workload, model_state = case.workload, case.variables.model_state

  def train_loss(params: Params) -> Array:
    return workload.train_loss(params, model_state, case.batch, case.key)[0]

  def example_losses(params: Params) -> Array:
    if workload.batch_norm not in ("none", "running"):
      return jnp.float32(0)  # no loss of one example exists
    return jnp.mean(jax.vmap(workload.example_loss, (None, None, 0))(params, model_state, case.batch))

  def largest(loss: Callable[[Params], Array], params: Params) -> Array:
    return jnp.stack([jnp.max(jnp.abs(grad), initial=0) for grad in jax.tree.leaves(jax.grad(loss)(params))])

  @jax.jit
  def measure(params: Params, key: Key) -> tuple[Array, Array, Array]:
    return largest(train_loss, params), largest(train_loss, nudged(params, key)), largest(example_losses, params)

  seeds = jax.random.split(case.key, SEEDS)
  measured = [jax.device_get(measure(workload.init(key).params, key)) for key in seeds]
  at_start, beside, of_examples = (np.stack(found) for found in zip(*measured, strict=True))
  return at_start, beside, of_examples


def check_key(case: Case) -> Diagnosis:
  """Computes everything twice, compiled anew, and compares bit by bit."""
  workload = case.workload

  def everything(variables: Variables, batch: Batch, key: Key) -> list[Array]:
    gradient = jax.value_and_grad(workload.train_loss, has_aux=True)(*variables, batch, key)
    losses = jax.vmap(workload.example_loss, (None, None, 0))(*variables, batch)
    return jax.tree.leaves((workload.init(key), gradient, losses))

  # A function of its own for each: jit would find the program of a function that it knows. A jit inside of them remembers what it has
  # traced, a numpy draw included, but only under one configuration of JAX; this one changes nothing but warnings.
  first = jax.device_get(jax.jit(lambda *arguments: everything(*arguments))(case.variables, case.batch, case.key))
  with jax.numpy_rank_promotion("warn"), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    again = jax.device_get(jax.jit(lambda *arguments: everything(*arguments))(case.variables, case.batch, case.key))
  differ = sum(a.tobytes() != b.tobytes() for a, b in zip(first, again, strict=True))
  numbers = {"arrays": len(first), "differ": differ, "uses_key": float(case.uses_key)}
  if differ:
    message = f"{differ} of {len(first)} arrays differ between two runs with one key: draw from jax.random with the key, never from numpy"
    return Diagnosis("key", "fix", message, numbers)
  depends = "depends on the key (dropout or augmentation)" if case.uses_key else "does not depend on the key"
  return Diagnosis("key", "ok", f"same key, same bits; train_loss {depends}", numbers)


def check_batch_norm(case: Case) -> Diagnosis:
  """Compares the stated batch norm with the model state, with how an example's loss depends on its neighbours and on that state."""
  name, mode = "batch_norm", case.workload.batch_norm
  # Each half twice: all three batches are equally large, so that a sum over examples is not taken for batch norm.
  halves = [case.train_losses(join(half, half)) for half in (case.batch, case.other)]
  found = compare(case.train_losses(join(case.batch, case.other)), sum(halves) / 2, case.rounding)
  arrays = jax.tree.leaves(case.variables.model_state)
  _, after = case.train_loss(*case.variables, case.batch, case.key)
  moved = any(
    (np.asarray(old) != np.asarray(new)).any() for old, new in zip(arrays, jax.tree.leaves(after), strict=True)
  )
  numbers = {"difference": found.difference, "state_arrays": len(arrays), "state_moves": float(moved)}
  if not np.isfinite(found.first):
    return _not_finite(name, "train_loss", found.first)
  if mode == "none" and not found.agrees:
    message = (
      f"the loss of a batch is {found.difference:.1g} away from that of its halves: it depends on which examples come together, "
      "though batch_norm is 'none': state batch_norm='running', or normalise each example by itself"
    )
  elif mode == "none" and arrays:
    message = f"model_state holds {len(arrays)} arrays, though batch_norm is 'none': state 'running', or keep it empty"
  elif mode != "none" and not arrays:
    message = f"batch_norm is {mode!r}, but model_state is empty: return the statistics from init and train_loss, or state 'none'"
  elif mode == "running" and not moved:
    message = "batch_norm is 'running', but train_loss returns model_state unchanged: return the new running statistics"
  elif mode == "running" and not _example_loss_sees_state(case):
    message = (
      "batch_norm is 'running', but example_loss does not change with model_state: normalise with the running averages there, as "
      "train=False does in most libraries"
    )
  elif mode != "running" and mode != "none":
    message = f"{mode!r}: trains, but no loss of one example exists, so that probes refuse it; 'running' evaluates with running averages"
    return Diagnosis(name, "note", message, numbers)
  else:
    stated = (
      f"{len(arrays)} arrays of statistics, which training moves"
      if arrays
      else "no statistics, and no example's loss depends on another"
    )
    return Diagnosis(name, "ok", f"{mode!r}: {stated}", numbers)
  return Diagnosis(name, "fix", message, numbers)


def _example_loss_sees_state(case: Case) -> bool:
  """Tells whether another model state changes a loss; beside the initial parameters, where a last layer of zeros hides nothing."""
  params = nudged(case.variables.params, case.key)
  losses = jax.jit(jax.vmap(case.workload.example_loss, (None, None, 0)))

  def other(leaf: Array) -> Array:
    return 2 * leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

  model_state = case.variables.model_state
  here, there = (losses(params, state, case.batch) for state in (model_state, jax.tree.map(other, model_state)))
  return bool((here != there).any())
