"""Each optimizer against its formula, written in numpy; one program for every value of the hyperparameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.optim import OPTIMIZERS, make_optimizer, make_schedule
from bsjax.types import Hparams

FACTORS = (0.25, 0.5, 1.0, 0.9, 0.5, 0.1, 0.05)
"""A schedule that changes at every step."""
HPARAMS = Hparams(learning_rate=0.3, momentum=0.8, beta2=0.9, weight_decay=0.05)


def start_params():
  rng = np.random.default_rng(0)
  return {"bias": rng.normal(size=4), "kernel": rng.normal(size=(3, 4)), "scale": np.array(1.5)}


def gradient_at(params, step):
  """A gradient that depends on the parameters, on the step, and differs in scale between parameters."""
  return {name: (10.0**i) * (p + 0.3 * (step + 1) * abs(p) - 1.0) for i, (name, p) in enumerate(params.items())}


def norm(x):
  return np.sqrt(np.sum(x * x))


def run_formula(name):
  """Run the formulas of the docstring of `make_optimizer`, one parameter at a time."""
  lr, m, b2, lam = HPARAMS
  params = start_params()
  zeros = {key: np.zeros_like(w) for key, w in params.items()}
  first, second = dict(zeros), dict(zeros)
  for step, factor in enumerate(FACTORS):
    eta = lr * factor
    for key, g in gradient_at(params, step).items():
      w = params[key]
      is_layer = w.ndim > 1
      decay = lam if is_layer else 0.0
      d = g + decay * w
      if name == "sgd":
        update = eta * d
      elif name == "momentum":
        first[key] = m * first[key] + d
        update = eta * first[key]
      elif name == "nesterov":
        first[key] = m * first[key] + d
        update = eta * (d + m * first[key])
      elif name == "lars":
        ratio = 0.001 * norm(w) / norm(d) if is_layer else 1.0
        update = first[key] = m * first[key] + eta * ratio * d
      else:
        first[key] = m * first[key] + (1 - m) * g
        second[key] = b2 * second[key] + (1 - b2) * g**2
        debiased = first[key] / (1 - m ** (step + 1)), second[key] / (1 - b2 ** (step + 1))
        r = debiased[0] / (np.sqrt(debiased[1]) + {"adamw": 1e-8, "lamb": 1e-6}[name]) + decay * w
        ratio = norm(w) / norm(r) if is_layer and name == "lamb" else 1.0
        update = eta * ratio * r
      params[key] = w - update
  return params


def run_optax(name, hparams, params):
  """Run the optimizer, built here, inside whatever traces this."""
  factors = jnp.array(FACTORS)
  optimizer = make_optimizer(name, hparams, lambda step: factors[step])
  state = optimizer.init(params)

  def advance(carry, step):
    params, state = carry
    updates, state = optimizer.update(gradient_at(params, step), state, params)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(advance, (params, state), jnp.arange(len(FACTORS), dtype=float))
  return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_follows_its_formula(name):
  with jax.enable_x64(True):
    traced = jax.tree.map(jnp.asarray, HPARAMS)
    got = jax.jit(functools.partial(run_optax, name))(traced, jax.tree.map(jnp.asarray, start_params()))
    # Seven steps in float64: about 1e-16 each, amplified by sums over 12 entries and Adam's square roots.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, run_formula(name))


def test_formulas_differ():
  """No two optimizers share a formula here, so that the test above tells them apart."""
  ends = [run_formula(name)["kernel"] for name in OPTIMIZERS]
  for i, end in enumerate(ends):
    assert all(np.max(np.abs(end - other)) > 1e-3 for other in ends[:i])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_program_serves_all_rates_and_equals_the_lone_run(name):
  traces = []

  def run(rate, decay):
    traces.append(name)
    hparams = HPARAMS._replace(learning_rate=rate, weight_decay=decay)
    return run_optax(name, hparams, jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), start_params()))

  rates, decays = jnp.array([0.01, 0.1, 0.3]), jnp.array([0.0, 0.1, 0.01])
  lone = jax.jit(run)
  runs = [lone(rate, decay) for rate, decay in zip(rates, decays, strict=True)]
  assert len(traces) == 1
  together = jax.vmap(run)(rates, decays)
  for i, alone in enumerate(runs):
    # Same float32 arithmetic, fused differently: a few roundings of 6e-8 in each of seven steps, which the gradient
    # amplifies by up to eta * 100 * 3 in its largest coordinate.
    jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-4), together, alone)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_shrinks_layers_and_spares_the_rest(name):
  """Without a gradient, the decay is all that moves a parameter."""
  params = jax.tree.map(jnp.asarray, start_params())
  optimizer = make_optimizer(name, HPARAMS, make_schedule("constant", num_steps=3))
  updates, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
  np.testing.assert_array_equal(updates["bias"], 0)
  np.testing.assert_array_equal(updates["scale"], 0)
  shrinkage = -updates["kernel"] / params["kernel"]
  expected = {"lars": 0.3 * 0.001, "lamb": 0.3, "nesterov": 0.3 * 0.05 * 1.8}.get(name, 0.3 * 0.05)
  np.testing.assert_allclose(shrinkage, expected, rtol=1e-6)  # five float32 roundings of 6e-8


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match="'adam'; use one of sgd, momentum, nesterov, adamw, lars, lamb"):
    make_optimizer("adam", HPARAMS, make_schedule("constant", num_steps=3))
