"""Whether per-example gradient norms and Gauss-Newton products can be had, and by which route."""

import jax
import numpy as np

from bsjax.probes import ghost_norms, ghost_routes, per_example_grads
from bsjax.probes.leaves import leaf_sq_norms
from bsjax.study.diagnosis import NOT_FINITE, Case, Diagnosis, compare, listed
from bsjax.types import Array, Batch, Example, ModelState, Params

COMPARED = 4
"""Examples whose norms are taken by both routes: per-example gradients are that many times the parameters."""
NORM_ROUNDINGS = 10
"""How much farther than two losses two squared norms may lie apart: they square the rounding, and a Gram matrix cancels."""


def check_ghost_norms(case: Case) -> Diagnosis:
  """Tells the route of every parameter array, and compares the norms of some examples with those of their gradients."""
  workload, (params, model_state) = case.workload, case.variables
  if workload.batch_norm not in ("none", "running"):
    return Diagnosis(
      "ghost norms", "note", f"none: batch_norm={workload.batch_norm!r} leaves no loss of one example; use 'running'"
    )
  examples = {name: array[:COMPARED] for name, array in case.batch.items()}

  def loss_fn(params: Params, example: Example) -> Array:
    return workload.example_loss(params, model_state, example)

  def both(params: Params, examples: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
    ghost = ghost_norms(loss_fn, params, examples, chunk_size=COMPARED).sq_norms
    return ghost, jax.vmap(leaf_sq_norms)(per_example_grads(loss_fn, params, examples))

  routes = ghost_routes(loss_fn, params, examples)
  ghost, exact = jax.device_get(jax.jit(both)(params, examples))
  if not all(np.isfinite(norms).all() for norms in exact.values()):
    return Diagnosis("ghost norms", "fix", f"gradients of example_loss are not finite at initialisation: {NOT_FINITE}")
  total = np.maximum(np.sum(list(exact.values()), axis=0), np.finfo(np.float32).tiny)
  apart = max(float(np.max(np.abs(ghost[leaf] - exact[leaf]) / total)) for leaf in exact)
  fallen = {leaf: route.removeprefix("vmap: ") for leaf, route in routes.items() if route.startswith("vmap")}
  numbers = {"arrays": float(len(routes)), "by_vmap": float(len(fallen)), "difference": apart}
  if not apart <= NORM_ROUNDINGS * case.rounding:
    message = f"{apart:.1g} of the norm away from vmap(grad): make example_loss a pure function; if it is one, report a bug of bsjax"
    return Diagnosis("ghost norms", "fix", message, numbers)
  kinds = [route for route in routes.values() if not route.startswith("vmap")]
  told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
  if fallen:
    reasons = listed([f"{leaf} ({reason})" for leaf, reason in fallen.items()])
    message = f"{told or 'none'}; {len(fallen)} by vmap, which is slower: {reasons}; {apart:.1g} from vmap(grad)"
    return Diagnosis("ghost norms", "note", message, numbers)
  return Diagnosis("ghost norms", "ok", f"all {len(routes)} arrays: {told}; {apart:.1g} from vmap(grad)", numbers)


def check_gauss_newton(case: Case) -> Diagnosis:
  """Compares `example_loss` with its two parts, which the Gauss-Newton matrix needs."""
  name, workload = "Gauss-Newton", case.workload
  outputs_fn, output_loss = workload.example_outputs, workload.output_loss
  if outputs_fn is None or output_loss is None:
    return Diagnosis(
      name, "note", "not measured: give example_outputs and output_loss, the loss in two parts, to have it"
    )

  def in_parts(params: Params, model_state: ModelState, example: Example) -> Array:
    return output_loss(outputs_fn(params, model_state, example), example)

  losses = [
    np.asarray(jax.jit(jax.vmap(function, (None, None, 0)))(*case.variables, case.batch), np.float64)
    for function in (workload.example_loss, in_parts)
  ]
  found = max(
    (compare([whole], [parts], case.rounding) for whole, parts in zip(*losses, strict=True)),
    key=lambda each: each.difference,
  )
  numbers = {"example_loss": found.first, "in_parts": found.second, "difference": found.difference}
  if found.agrees:
    return Diagnosis(name, "ok", f"output_loss(example_outputs) is example_loss, to {found.difference:.1g}", numbers)
  message = f"output_loss(example_outputs) is {found.second:.6g} where example_loss is {found.first:.6g}: make them the same loss"
  return Diagnosis(name, "fix", message, numbers)
