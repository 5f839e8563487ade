"""What every network has to allow: training steps, losses of single examples, curvature products and ghost norms, and bfloat16.

Each network is scaled down and gets random parameters and statistics, so that none is zero. A new network adds a row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import KEY, random_variables
from jax.flatten_util import ravel_pytree

from bsjax.conv import convolution_p
from bsjax.models import autoencoder, cifar_resnet, cnn, deep, imagenet_resnet, mlp, shallow, vgg11
from bsjax.probes import gauss_newton_vector_product, ghost_norms, ghost_routes, hessian_vector_product

NETWORKS = {
  # name: (builder, shape of an image); three classes
  "mlp": (functools.partial(mlp, widths=(7, 5), num_classes=3, batch_norm="running"), (6,)),
  "cnn": (functools.partial(cnn, num_classes=3, channels=(2, 3), widths=(5,), dropout=0.4), (4, 4, 2)),
  "shallow": (functools.partial(shallow, num_classes=3, channels=2, widths=(5, 4), batch_norm="running"), (6, 6, 2)),
  "deep": (functools.partial(deep, num_classes=3, channels=2, batch_norm="running"), (4, 4, 2)),
  "imagenet_resnet": (functools.partial(imagenet_resnet, num_classes=3, blocks=(1, 1), channels=2), (16, 16, 2)),
  "resnet8": (functools.partial(cifar_resnet, num_classes=3, depth=8, channels=2), (8, 8, 2)),
  "vgg11": (functools.partial(vgg11, num_classes=3, channels=2, widths=(5, 4)), (8, 8, 2)),
  "autoencoder": (functools.partial(autoencoder, code_size=4, channels=2), (16, 16, 1)),
}
WITH_DROPOUT = {"cnn", "shallow", "deep", "vgg11"}
BATCH_SIZE = 3


def model_of(name, dtype=None):
  builder, shape = NETWORKS[name]
  return builder(shape, dtype=dtype)


def examples_of(name, dtype):
  images = np.random.default_rng(0).uniform(0, 1, (BATCH_SIZE, *NETWORKS[name][1]))
  return {"image": jnp.asarray(images, dtype), "label": jnp.arange(BATCH_SIZE)}


def losses_of(name, model, state):
  """The outputs for one example and their loss, as the probes want them."""

  def outputs(params, example):
    return model.apply(params, state, example["image"][None], train=False)[0][0]

  def output_loss(z, example):
    if name == "autoencoder":
      return jnp.sum((z - example["image"]) ** 2)
    return optax.softmax_cross_entropy_with_integer_labels(z, example["label"])

  return outputs, output_loss


def assert_near(actual, expected, tolerance):
  """The largest difference of two pytrees, relative to the largest entry."""
  scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
  assert scale > 0
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.shape == e.shape
    assert float(jnp.max(jnp.abs(a - e))) <= tolerance * scale


def assert_norms(ghosts, sq_norms, tolerance):
  """Leaf by leaf, as leaves differ by orders of magnitude."""
  for norms, expected in zip(ghosts.sq_norms.values(), jax.tree.leaves(sq_norms), strict=True):
    assert_near(norms, expected, tolerance)


def pull_of(model, state, images):
  """`(params, cotangents) -> (z, J'c)` for a batch at once, with J the Jacobian of its outputs z."""

  @jax.jit
  def pull(params, cotangents):
    z, transposed = jax.vjp(lambda params: model.apply(params, state, images, train=False)[0], params)
    return z, transposed(cotangents)[0]

  return pull


@pytest.mark.parametrize("name", NETWORKS)
def test_probes_agree_with_gradients_of_a_batch(name):
  """Norms against J'c_i; Hessian and Gauss-Newton products against differences along the vector. J is that of a whole batch."""
  with jax.enable_x64(True):
    model = model_of(name)
    params, state = random_variables(model)
    examples = examples_of(name, "float64")
    outputs, output_loss = losses_of(name, model, state)
    pull = pull_of(model, state, examples["image"])

    def loss(params, example):
      return output_loss(outputs(params, example), example)

    @jax.jit
    def loss_grads(z):
      return jax.vmap(jax.grad(output_loss))(z, examples)

    def outputs_of(params):
      return pull(params, jnp.zeros(jax.eval_shape(jax.vmap(outputs, (None, 0)), params, examples).shape))[0]

    def mean_grad(params):
      return pull(params, loss_grads(outputs_of(params)) / BATCH_SIZE)[1]

    generator = np.random.default_rng(3)
    vector = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape), params)
    eps = 1e-6
    ahead, behind = (jax.tree.map(lambda p, v, e=e: p + e * v, params, vector) for e in (eps, -eps))

    def difference(fun):
      return jax.tree.map(lambda a, b: (a - b) / (2 * eps), fun(ahead), fun(behind))

    z = outputs_of(params)
    per_example = [pull(params, loss_grads(z).at[np.arange(BATCH_SIZE) != i].set(0))[1] for i in range(BATCH_SIZE)]
    sq_norms = jax.tree.map(lambda *grads: np.stack([np.sum(grad**2) for grad in grads]), *per_example)
    ghosts = jax.jit(functools.partial(ghost_norms, loss, chunk_size=BATCH_SIZE))(params, examples)
    # Two programs for one sum: thousands of roundings of 2^-53, of sums that cancel in part.
    assert_norms(ghosts, sq_norms, 1e-12)
    assert_near(ghosts.mean_grad, mean_grad(params), 1e-12)

    # Central differences: eps^2 = 1e-12 of a third derivative, and 2^-53 / eps = 1e-10 of rounding.
    hvp = functools.partial(hessian_vector_product, loss, chunk_size=BATCH_SIZE)
    assert_near(jax.jit(hvp)(params, examples, vector), difference(mean_grad), 1e-7)
    pushed = difference(outputs_of)
    curved = (loss_grads(z + eps * pushed) - loss_grads(z - eps * pushed)) / (2 * eps)
    gnvp = functools.partial(gauss_newton_vector_product, outputs, output_loss, chunk_size=BATCH_SIZE)
    assert_near(jax.jit(gnvp)(params, examples, vector), pull(params, curved / BATCH_SIZE)[1], 1e-7)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_parameter_falls_back_to_vmap(name, dtype):
  model = model_of(name, dtype)
  params, state = random_variables(model, "float32")
  outputs, output_loss = losses_of(name, model, state)
  routes = ghost_routes(lambda p, e: output_loss(outputs(p, e), e), params, examples_of(name, "float32"))
  assert {route.split(":")[0] for route in routes.values()} <= {"rank one", "gram", "direct", "sum"}


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_what_layers_compute_in_and_float32_what_they_keep(name):
  """Parameters, moments, gradients and outputs are float32, and so is the last dense layer; every other map is bfloat16."""
  model = model_of(name, jnp.bfloat16)
  variables = jax.eval_shape(model.init, KEY)
  images = examples_of(name, "float32")["image"]

  def loss(params, state):
    z, state = model.apply(params, state, images, train=True, key=KEY)
    return jnp.sum(z**2), (z, state)

  grads, (z, state) = jax.eval_shape(jax.grad(loss, has_aux=True), *variables)
  assert {leaf.dtype for leaf in jax.tree.leaves((variables, grads, z, state))} == {np.dtype("float32")}
  jaxpr = jax.make_jaxpr(functools.partial(model.apply, train=True))(*variables, images, key=KEY)
  maps = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name in (convolution_p.name, "dot_general")]
  dtypes = [eqn.outvars[0].aval.dtype for eqn in maps]
  last = [] if name == "autoencoder" else [np.dtype("float32")]
  assert dtypes == [np.dtype(jnp.bfloat16)] * (len(maps) - len(last)) + last
  assert len(maps) == sum("kernel" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(grads))


@pytest.mark.parametrize("name", ["shallow", "autoencoder"])
def test_ghost_norms_in_bfloat16(name):
  model = model_of(name, jnp.bfloat16)
  params, state = random_variables(model, "float32")
  examples = examples_of(name, "float32")
  outputs, output_loss = losses_of(name, model, state)
  pull = pull_of(model, state, examples["image"])
  loss_grads = jax.vmap(jax.grad(output_loss))

  def loss(params, example):
    return output_loss(outputs(params, example), example)

  z = pull(params, jnp.zeros_like(examples["image"]) if name == "autoencoder" else jnp.zeros((BATCH_SIZE, 3)))[0]
  exact, _ = model_of(name).apply(params, state, examples["image"], train=False)
  assert 0 < float(jnp.max(jnp.abs(z - exact))) < 0.1
  per_example = [pull(params, loss_grads(z, examples).at[np.arange(BATCH_SIZE) != i].set(0))[1] for i in range(3)]
  sq_norms = jax.tree.map(lambda *grads: np.stack([np.sum(grad**2) for grad in grads]), *per_example)
  ghosts = jax.jit(functools.partial(ghost_norms, loss, chunk_size=BATCH_SIZE))(params, examples)
  # Sums over pixels are rounded to bfloat16 (2^-8) in one of the routes, in float32 in the other; squares double it.
  assert_norms(ghosts, sq_norms, 3 * 2**-8)


@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_curvature_products_in_bfloat16(name):
  """Near those in float32, in the norm of the whole vector: 0.005 to 0.01 was seen, where bfloat16 rounds to 2^-9 = 0.002."""
  params, state = random_variables(model_of(name), "float32")
  examples = examples_of(name, "float32")
  generator = np.random.default_rng(3)
  vector = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), params)

  @functools.partial(jax.jit, static_argnums=0)
  def products(dtype):
    outputs, output_loss = losses_of(name, model_of(name, dtype), state)
    hvp = hessian_vector_product(
      lambda p, e: output_loss(outputs(p, e), e), params, examples, vector, chunk_size=BATCH_SIZE
    )
    return hvp, gauss_newton_vector_product(outputs, output_loss, params, examples, vector, chunk_size=BATCH_SIZE)

  for half, exact in zip(products(jnp.bfloat16), products(None), strict=True):
    half, exact = (ravel_pytree(product)[0] for product in (half, exact))
    assert half.dtype == jnp.float32
    assert 1e-4 < float(jnp.linalg.norm(half - exact) / jnp.linalg.norm(exact)) < 0.03


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step(name):
  """Runs in float32 under jit, moves the statistics, and depends on the key exactly where there is dropout."""
  model = model_of(name)
  params, state = random_variables(model, "float32")
  images = examples_of(name, "float32")["image"]
  step = jax.jit(functools.partial(model.apply, train=True))
  (z, new_state), (again, _), (other, _) = (step(params, state, images, key=jax.random.key(seed)) for seed in (1, 1, 2))
  assert np.isfinite(z).all()
  assert (z == again).all()
  assert bool((z != other).any()) is (name in WITH_DROPOUT)
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  assert all((new != old).any() for new, old in zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True))
  if name in WITH_DROPOUT:
    with pytest.raises(ValueError, match="no key"):
      jax.eval_shape(functools.partial(model.apply, train=True), params, state, images)
