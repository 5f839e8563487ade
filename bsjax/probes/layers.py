"""A loss as a function of one layer's parameters: diagonal blocks of its curvature."""

import jax

from bsjax.probes.leaves import group_leaves, leaf_names
from bsjax.probes.per_example import LossFn
from bsjax.types import Array, Example, Params


def layer_loss(loss_fn: LossFn, params: Params, layer: str) -> tuple[LossFn, dict[str, Array]]:
  """Hold every parameter fixed but those of one layer.

  The Hessian of the result is the layer's diagonal block of the Hessian, and its products cost no more than derivatives with
  respect to that layer do: those of the layers before it are not computed.

  Args:
    loss_fn: the loss of one example.
    params: where to evaluate.
    layer: its name, as `leaves.layer_of` gives it: "Dense_0"; a bare array is "params".

  Returns:
    The loss of one example as a function of the layer's parameters, and those parameters: arrays by leaf name.

  Raises:
    ValueError: there is no such layer.
  """
  names = leaf_names(params)
  leaves, treedef = jax.tree.flatten(params)
  layers = group_leaves(dict.fromkeys(names))
  if layer not in layers:
    raise ValueError(f"layer={layer!r} is not in the parameters; use one of {', '.join(layers)}.")

  def loss_of_layer(own: dict[str, Array], example: Example) -> Array:
    merged = [own.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    return loss_fn(jax.tree.unflatten(treedef, merged), example)

  return loss_of_layer, {name: leaf for name, leaf in zip(names, leaves, strict=True) if name in layers[layer]}
