"""The sequence models in bfloat16: near float32, with float32 where it was promised, and at full size on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from bsjax.models import BILLION_WORD_LSTMS, TRANSFORMERS, language_model, lstm, vit, vit_s16

KEY = jax.random.key(5)
VOCAB, LENGTH = 11, 5
BLOCKS = {"width": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 3}
IMAGES = jax.random.normal(KEY, (3, 4, 6, 2))
TOKENS = jax.random.randint(KEY, (3, LENGTH), 0, VOCAB)
MODELS = {
  "vit": lambda dtype: vit((4, 6, 2), 3, patch_size=2, **BLOCKS, dtype=dtype),
  "tied": lambda dtype: language_model(VOCAB, LENGTH, **BLOCKS, dtype=dtype),
  "untied": lambda dtype: language_model(VOCAB, LENGTH, **BLOCKS, tie_embeddings=False, dtype=dtype),
  "lstm": lambda dtype: lstm(VOCAB, LENGTH, width=8, embedding=6, dtype=dtype),
}


def problem(name):
  """Parameters that are uniform in [-0.5, 0.5), so that none is at its initial 0 or 1; a function of them; inputs."""
  generator = np.random.default_rng(1)
  shapes = jax.eval_shape(MODELS[name](None).init, KEY).params
  params = jax.tree.map(lambda leaf: generator.uniform(-0.5, 0.5, leaf.shape).astype(np.float32), shapes)
  inputs = IMAGES if name == "vit" else TOKENS
  return params, lambda dtype: lambda params: MODELS[name](dtype).apply(params, {}, inputs, train=True)[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_near_float32(name):
  """About 20 roundings of 2^-9 each, of logits of size one; without a dtype nothing is rounded."""
  params, apply = problem(name)
  exact, logits = jax.device_get(jax.jit(lambda p: (apply(None)(p), apply(jnp.bfloat16)(p)))(params))
  assert exact.dtype == logits.dtype == np.float32
  assert 1e-4 < np.max(np.abs(logits - exact)) < 0.05
  # Logits rounded to bfloat16 would come back from it unchanged.
  assert np.any(logits != logits.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("name", ["tied", "lstm"])
def test_gradients_are_float32_and_near(name):
  params, apply = problem(name)
  exact, grads = (
    jax.jit(jax.grad(lambda p, dtype=dtype: jnp.sum(jnp.sin(apply(dtype)(p)))))(params)
    for dtype in (None, jnp.bfloat16)
  )
  for want, grad in zip(jax.tree.leaves(exact), jax.tree.leaves(grads), strict=True):
    assert grad.dtype == jnp.float32
    assert np.linalg.norm(grad - want) < 0.05 * np.linalg.norm(want)


def operations(jaxpr):
  """Lists (primitive, dtype of each operand, shape of the first result) of a jaxpr and of all it calls."""
  for eqn in jaxpr.eqns:
    dtypes = tuple(str(atom.aval.dtype) for atom in eqn.invars)
    yield eqn.primitive.name, dtypes, eqn.outvars[0].aval.shape
    for inner in jaxprs_in_params(eqn.params):
      yield from operations(inner)


HALF, SINGLE = "bfloat16", "float32"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_in_what(name):
  """Products are in bfloat16 but for the classifier's last, and so is the sum that the blocks add to; the softmax, the moments, scale and
  shift of a LayerNorm and the cell are in float32."""
  params, apply = problem(name)
  found = list(operations(jax.make_jaxpr(apply(jnp.bfloat16))(params).jaxpr))
  of = {name: [dtypes for one, dtypes, _ in found if one == name] for name, _, _ in found}
  assert [dtypes for dtypes in of["dot_general"] if dtypes != (HALF, HALF)] == [(SINGLE, SINGLE)] * (name == "vit")
  if name == "lstm":
    assert of["logistic"] == [(HALF,)] * 3
    assert sorted(of["tanh"]) == [(HALF,), (SINGLE,)]  # of g, of c
  else:
    assert {*of["exp"], *of["rsqrt"]} == {(SINGLE,)}
    assert {*of["tanh"]} == {(HALF,)}
    width = (3, 6 if name == "vit" else LENGTH, BLOCKS["width"])
    sums = [dtypes for one, dtypes, shape in found if one == "add" and shape == width]
    assert sums.count((SINGLE, SINGLE)) == 3  # shifts: two LayerNorms of the block and the last
    # positions, two branches, and the biases of patches, query, value, out and the perceptron's last layer
    assert sums.count((HALF, HALF)) == len(sums) - 3 == (8 if name == "vit" else 7)


@pytest.mark.parametrize(
  ("model", "inputs", "shape"),
  [
    (vit_s16(dtype=jnp.bfloat16), jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32), (2, 1000)),
    *(
      (model, jax.ShapeDtypeStruct((2, 20), jnp.int32), (2, 20, 40_000))
      for model in (
        language_model(40_000, 20, **TRANSFORMERS["wide"], dtype=jnp.bfloat16),
        lstm(40_000, 20, **BILLION_WORD_LSTMS["2048"], dtype=jnp.bfloat16),
      )
    ),
  ],
)
def test_full_sizes_on_paper(model, inputs, shape):
  params = jax.eval_shape(model.init, KEY).params
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  logits = jax.eval_shape(lambda p, x: model.apply(p, {}, x, train=True)[0], params, inputs)
  assert (logits.shape, logits.dtype) == (shape, jnp.float32)
