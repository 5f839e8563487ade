"""Where parameters enter a loss: its operations, one by one, with a tap on every operation that is linear in a parameter.

The loss of one example is traced to a jaxpr, and its equations are then evaluated for a chunk of examples. Along the way
each value is one of three kinds: *batched* (it depends on the example, and has a leading axis n), a *weight* (the image of one
parameter array under maps that are linear in it: a transpose, a reshape, a cast, a broadcast), or *shared* (anything else). An
operation of a weight and batched values that is linear, or affine, in the weight is a *use* of the parameter: its output
y_i = x_i * W passes a tap, so that the backward pass also hands out d_i = dl_i/dy_i. From all uses (x_i, d_i) of a
parameter its per-example gradient follows, without the network or the model's code being touched.

A `scan` is looked into where parameters enter it as constants, such as the recurrent kernel of a recurrent network: what
does not change from step to step is computed before it, and a use in its body is one use with all steps of the loop.

Everything that is not recognised is safe: the parameter is called opaque, with the reason, and its gradients have to be
taken in another way. A `scan` in a `scan`, `while`, `cond` and functions with their own derivative rule are not looked into.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from bsjax.conv import convolution_p
from bsjax.types import Array, Batch

LINEAR_IN: dict[str, tuple[int, ...]] = {
  # primitive: the operands in each of which alone it is linear or affine
  "add": (0, 1),
  "add_any": (0, 1),
  "broadcast_in_dim": (0,),
  "concatenate": tuple(range(64)),
  "conv_general_dilated": (0, 1),
  "convert_element_type": (0,),
  "copy": (0,),
  "cumsum": (0,),
  "div": (0,),
  "dot_general": (0, 1),
  "dynamic_slice": (0,),
  "expand_dims": (0,),
  "gather": (0,),
  convolution_p.name: (0, 1),
  "mul": (0, 1),
  "neg": (0,),
  "pad": (0, 1),
  "reduce_sum": (0,),
  "reshape": (0,),
  "rev": (0,),
  "select_n": tuple(range(1, 64)),
  "slice": (0,),
  "squeeze": (0,),
  "sub": (0, 1),
  "transpose": (0,),
}
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
"""Calls that are looked into; a recomputation (`remat`) is dropped."""
ISOMETRIC = ("copy", "expand_dims", "reshape", "rev", "squeeze", "transpose")
"""Operations that only move entries."""


class Weight(NamedTuple):
  """A linear image of one parameter array."""

  leaf: int
  image: Callable[[Array], Array]
  """From the parameter to the value; affine."""
  axes: tuple[int, ...] | None
  """For each axis of the value, the parameter's axis that it is, where the image only permutes axes; else None."""
  layout: Callable[[Array], Array]
  """The image without its `scale` and casts, where `isometric`."""
  isometric: bool
  """Whether the image only moves and casts entries, apart from `scale`."""
  scale: Array | None
  """What the entries are multiplied with, laid out like `value`; None for 1."""
  value: Array


class Use(NamedTuple):
  """An operation that is linear in a parameter, evaluated for n examples."""

  eqn: JaxprEqn
  position: int
  """Which operand the weight is."""
  weight: Weight
  others: tuple[Array | None, ...]
  """The other operands in order; None for a batched one."""
  batched: list[Array]
  """The batched operands in order, f[n, ...]."""
  output: jax.ShapeDtypeStruct
  """What the operation returns for n examples."""
  steps: int = 0
  """In a loop: how many steps it has, an axis after n of the batched operands and of the output. Else 0, and no such axis."""

  def first_step(self) -> "Use":
    """The same operation outside the loop: with the operands of the first step."""
    shape = (self.output.shape[0], *self.output.shape[2:])
    output = jax.ShapeDtypeStruct(shape, self.output.dtype)
    return self._replace(batched=[operand[:, 0] for operand in self.batched], output=output, steps=0)

  def apply_one(self, parameter: Array, *batched: Array) -> Array:
    """Evaluate the operation for one example, as a function of the parameter."""
    if self.steps:
      return jax.vmap(self._replace(steps=0).apply_one, (None, *(0 for _ in batched)))(parameter, *batched)
    rest = iter(batched)
    operands = [next(rest) if value is None else value for value in self.others]
    operands.insert(self.position, self.weight.image(parameter))
    return _bind(self.eqn, operands)[0]


class Traced(NamedTuple):
  """A loss evaluated for n examples."""

  losses: Array
  """f[n]."""
  uses: list[Use]
  opaque: dict[int, str]
  """Parameter arrays that are used in a way not understood: index to reason."""


class _Batched(NamedTuple):
  value: Array


class _Shared(NamedTuple):
  value: Any


def trace_loss(loss_fn: Callable[..., Array], params: Any, examples: Batch) -> ClosedJaxpr:
  """Trace the loss of one example, given a chunk of them; parameters and example are flat arguments, parameters first."""
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
  return jax.make_jaxpr(loss_fn)(params, one)


def evaluate_loss(
  jaxpr: ClosedJaxpr, params: Sequence[Array], examples: Sequence[Array], *, taps: Sequence[Array] | None = None
) -> Traced:
  """Evaluate a traced loss for n examples.

  Args:
    jaxpr: from `trace_loss`.
    params: the flat parameters.
    examples: the flat examples, each with a leading axis n.
    taps: one array of zeros per use, shaped like its output; the derivative of a sum of losses with respect to it is d_i.
      None: no taps.
  """
  evaluation = _Evaluation(None if taps is None else iter(taps))
  weights = [
    Weight(index, _same, tuple(range(array.ndim)), _same, True, None, array) for index, array in enumerate(params)
  ]
  arguments = [*weights, *(_Batched(array) for array in examples)]
  (loss,) = evaluation.call(jaxpr, arguments)
  num_examples = examples[0].shape[0]
  losses = loss.value if isinstance(loss, _Batched) else jnp.broadcast_to(loss.value, (num_examples,))
  if isinstance(loss, Weight):
    evaluation.opaque[loss.leaf] = "is the loss itself"
  return Traced(losses, evaluation.uses, evaluation.opaque)


class _Evaluation:
  """Walks the equations; collects the uses and what is opaque.

  In the body of a loop whatever is computed is batched, over `loop_examples`, so that a use there holds no value that changes from step
  to step but those of its batched operands; and a weight is used, never extended.
  """

  def __init__(self, taps: Iterator[Array] | None, *, loop_examples: int = 0) -> None:
    self.taps = taps
    self.loop_examples = loop_examples
    self.uses: list[Use] = []
    self.opaque: dict[int, str] = {}

  def call(self, function: Any, arguments: Sequence[Any]) -> list[Any]:
    jaxpr, consts = _opened(function)
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    self.run(jaxpr.eqns, known)
    return [_read(known, atom) for atom in jaxpr.outvars]

  def run(self, eqns: Sequence[JaxprEqn], known: dict[Any, Any]) -> None:
    """Evaluates equations one after the other, adding what they return to what is known."""
    for eqn in eqns:
      results = self.step(eqn, [_read(known, atom) for atom in eqn.invars])
      known.update(zip(eqn.outvars, results, strict=True))

  def step(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    weights = [position for position, operand in enumerate(operands) if isinstance(operand, Weight)]
    if weights and name in INLINED:
      return self.call(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), operands)
    batched = [isinstance(operand, _Batched) for operand in operands]
    allowed = any(batched) or not self.loop_examples
    if len(weights) == 1 and allowed and weights[0] in LINEAR_IN.get(name, ()) and _is_float(eqn.outvars[0]):
      return [self.linear(eqn, operands, weights[0])]
    if weights and name == "scan" and eqn.params["length"] and any(batched) and not self.loop_examples:
      return self.loop(eqn, operands)
    for position in weights:
      reason = f"meets another parameter in {name}" if len(weights) > 1 else f"flows into {name}"
      self.opaque.setdefault(operands[position].leaf, reason)
    values = [operand.value for operand in operands]
    if not any(batched):
      shared = _bind(eqn, values)
      if self.loop_examples:
        return [_Batched(_spread(value, self.loop_examples)) for value in shared]
      return [_Shared(value) for value in shared]
    return [_Batched(value) for value in _bind_batched(eqn, values, batched)]

  def linear(self, eqn: JaxprEqn, operands: list[Any], position: int) -> Any:
    """Extend the image of a weight, or note a use of it."""
    others = [operand for at, operand in enumerate(operands) if at != position]
    batched = [operand.value for operand in others if isinstance(operand, _Batched)]
    shared = tuple(None if isinstance(operand, _Batched) else operand.value for operand in others)
    values = [operand.value for operand in operands]
    if not batched:
      return _extended(eqn, operands[position], position, shared, _bind(eqn, values)[0])
    (out,) = _bind_batched(eqn, values, [isinstance(operand, _Batched) for operand in operands])
    if self.taps is not None:
      out = _tapped(out, next(self.taps))
    output = jax.ShapeDtypeStruct(out.shape, out.dtype)
    self.uses.append(Use(eqn, position, operands[position], shared, batched, output))
    return _Batched(out)

  def loop(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
    """Runs a `scan` whose body may use the weights among its constants; what is carried and scanned is batched."""
    num_consts, num_carry, steps = (eqn.params[name] for name in ("num_consts", "num_carry", "length"))
    jaxpr, consts = _opened(eqn.params["jaxpr"])
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars[:num_consts]], [*consts, *operands[:num_consts]], strict=True))
    varying = []
    for inner in jaxpr.eqns:
      if all(isinstance(atom, Literal) or atom in known for atom in inner.invars):
        self.run([inner], known)
      else:
        varying.append(inner)
    num_examples = next(operand.value.shape[0] for operand in operands if isinstance(operand, _Batched))

    def batched(operand: Any) -> Array:
      if isinstance(operand, Weight):
        self.opaque.setdefault(operand.leaf, "is carried through scan")
      return operand.value if isinstance(operand, _Batched) else _spread(operand.value, num_examples)

    uses: list[Use] = []

    def body(carry: list[Array], inputs: tuple[list[Array], Sequence[Array] | None]) -> Any:
      scanned, taps = inputs
      evaluation = _Evaluation(None if taps is None else iter(taps), loop_examples=num_examples)
      within = known | dict(zip(jaxpr.invars[num_consts:], map(_Batched, [*carry, *scanned]), strict=True))
      evaluation.run(varying, within)
      uses[:] = evaluation.uses  # not added: JAX may trace a body more than once
      self.opaque |= evaluation.opaque
      results = [batched(_read(within, atom)) for atom in jaxpr.outvars]
      return results[:num_carry], (results[num_carry:], [use.batched for use in uses])

    carry, scanned = [batched(x) for x in operands[num_consts:][:num_carry]], operands[num_consts + num_carry :]
    scanned = [jnp.swapaxes(batched(x), 0, 1) for x in scanned]
    jax.eval_shape(lambda: jax.lax.scan(body, carry, (scanned, None), length=steps))  # for the number of uses
    taps = None if self.taps is None else [jnp.swapaxes(next(self.taps), 0, 1) for _ in uses]
    options = {name: eqn.params[name] for name in ("reverse", "unroll")}
    carry, (stacked, used) = jax.lax.scan(body, carry, (scanned, taps), length=steps, **options)
    for use, values in zip(uses, used, strict=True):
      shape = (num_examples, steps, *use.output.shape[1:])
      output = jax.ShapeDtypeStruct(shape, use.output.dtype)
      self.uses.append(use._replace(batched=[jnp.swapaxes(x, 0, 1) for x in values], output=output, steps=steps))
    return [*map(_Batched, carry), *(_Batched(jnp.swapaxes(x, 0, 1)) for x in stacked)]


def _opened(function: Any) -> tuple[Any, list[_Shared]]:
  """Separates a jaxpr, closed or not, from its constants."""
  if isinstance(function, ClosedJaxpr):
    return function.jaxpr, [_Shared(const) for const in function.consts]
  return function, []


def _read(known: Mapping[Any, Any], atom: Any) -> Any:
  return _Shared(atom.val) if isinstance(atom, Literal) else known[atom]


def _spread(value: Array, num_examples: int) -> Array:
  return jnp.broadcast_to(value, (num_examples, *jnp.shape(value)))


def _extended(eqn: JaxprEqn, weight: Weight, position: int, shared: tuple[Any, ...], value: Array) -> Weight:
  def image(parameter: Array) -> Array:
    return _bind(eqn, [*shared[:position], weight.image(parameter), *shared[position:]])[0]

  def moved(parameter: Array) -> Array:
    return _bind(eqn, [weight.layout(parameter)])[0]

  name, axes, scale = eqn.primitive.name, None, weight.scale
  moves = name in ISOMETRIC or (
    name in ("broadcast_in_dim", "convert_element_type") and value.size == weight.value.size
  )
  scales = name == "mul" and scale is None and value.size == weight.value.size
  if moves and scale is not None:
    scale = _bind(eqn, [scale])[0]
  if scales:
    scale = jnp.broadcast_to(shared[0], value.shape)
  if weight.axes is not None and name in ("transpose", "convert_element_type", "copy", "mul"):
    permutation = eqn.params.get("permutation", range(len(weight.axes)))
    axes = tuple(weight.axes[axis] for axis in permutation)
  layout = moved if moves and name != "convert_element_type" else weight.layout
  return Weight(weight.leaf, image, axes, layout, weight.isometric and (moves or scales), scale, value)


def _same(parameter: Array) -> Array:
  return parameter


def _bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
  out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
  return list(out) if eqn.primitive.multiple_results else [out]


def _bind_batched(eqn: JaxprEqn, values: Sequence[Any], batched: Sequence[bool]) -> list[Array]:
  in_axes = [0 if is_batched else None for is_batched in batched]
  return jax.vmap(lambda *values: _bind(eqn, values), in_axes=in_axes)(*values)


def _is_float(atom: Any) -> bool:
  return jnp.issubdtype(atom.aval.dtype, jnp.floating)


@jax.custom_vjp
def _tapped(value: Array, tap: Array) -> Array:
  """Returns `value`; its cotangent is also that of `tap`, which is never read."""
  del tap
  return value


_tapped.defvjp(lambda value, tap: (value, None), lambda _, cotangent: (cotangent, cotangent))
