"""Each optimizer against its formula, written in numpy; one program for every value of the hyperparameters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsjax.optim import OPTIMIZERS, make_optimizer, make_schedule
from bsjax.types import Hparams

FACTORS = (0.25, 0.5, 1.0, 0.9, 0.5, 0.1, 0.05)
"""A schedule that changes at every step."""
HPARAMS = Hparams(learning_rate=0.3, momentum=0.8, beta2=0.9, weight_decay=0.5, epsilon=1e-3, radius=0.7)
EQUAL = {"momentum_absorbed": "momentum", "nesterov_absorbed": "nesterov"}
"""Other arithmetic for the same formula."""


def start_params():
  rng = np.random.default_rng(0)
  return {"bias": rng.normal(size=4), "kernel": rng.normal(size=(3, 4)), "scale": np.array(1.5)}


def gradient_at(params, step):
  """A gradient that depends on the parameters, on the step, and differs in scale between parameters."""
  return {name: (10.0**i) * (p + 0.3 * (step + 1) * abs(p) - 1.0) for i, (name, p) in enumerate(params.items())}


def norm(x):
  return np.sqrt(np.sum(x * x))


def orthogonalize(matrix, eps):
  """Five Newton-Schulz steps towards the orthogonal factor, with the coefficients of Jordan et al."""
  x = matrix / (np.linalg.norm(matrix) + eps)
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
  return x


def rms(x):
  return np.sqrt(np.mean(x * x))


def run_formula(name):
  """Run the formulas of the docstring of `make_optimizer`, one parameter at a time."""
  lr, m, b2, lam, eps, radius, *_ = HPARAMS
  params = start_params()
  zeros = {key: np.zeros_like(w) for key, w in params.items()}
  first, second = dict(zeros), dict(zeros)
  for step, factor in enumerate(FACTORS):
    eta = lr * factor
    grads = gradient_at(params, step)
    if name == "sam":
      length = np.sqrt(sum(np.sum(g * g) for g in grads.values()))
      grads = gradient_at({key: w + radius * grads[key] / length for key, w in params.items()}, step)
    for key, g in grads.items():
      w = params[key]
      is_layer = w.ndim > 1
      decay = lam if is_layer else 0.0
      d = g + decay * w
      if name == "sgd":
        update = eta * d
      elif name in ("momentum", "momentum_absorbed", "sam"):
        first[key] = m * first[key] + d
        update = eta * first[key]
      elif name in ("nesterov", "nesterov_absorbed"):
        first[key] = m * first[key] + d
        update = eta * (d + m * first[key])
      elif name in ("lars", "lars_2017"):
        below = norm(d) if name == "lars" else norm(g) + decay * norm(w)
        ratio = 0.001 * norm(w) / below if is_layer else 1.0
        update = first[key] = m * first[key] + eta * ratio * d
      elif name == "lars_2019":
        first[key] = m * first[key] + (1 - m) * d
        update = eta * (norm(w) / norm(first[key]) if is_layer else 1.0) * first[key]
      elif name == "muon" and is_layer:
        first[key] = m * first[key] + (1 - m) * g
        ahead = m * first[key] / (1 - m ** (step + 2)) + (1 - m) * g / (1 - m ** (step + 1))
        update = eta * (np.sqrt(4 / 3) * orthogonalize(ahead, eps) + decay * w)
      elif name == "adafactor":
        kept = 1 - (step + 1) ** -0.8
        second[key] = kept * second[key] + (1 - kept) * (g**2 + 1e-30)
        u = g / np.sqrt(second[key])
        update = eta * (u / max(1, rms(u)) * max(rms(w), 1e-3) + decay * w)
      else:
        beta1 = 0.9 if name == "muon" else m
        x = d if name == "adam" else g
        first[key] = beta1 * first[key] + (1 - beta1) * x
        second[key] = b2 * second[key] + (1 - b2) * x**2
        corrections = (1.0, 1.0) if name == "lamb_v3" else (1 - beta1 ** (step + 1), 1 - b2 ** (step + 1))
        average = first[key] / corrections[0]
        if name == "muon":
          average = beta1 * first[key] / (1 - beta1 ** (step + 2)) + (1 - beta1) * x / corrections[0]
        r = average / (np.sqrt(second[key] / corrections[1]) + eps)
        r = r + decay * w if name != "adam" else r
        ratio = norm(w) / norm(r) if is_layer and name.startswith("lamb") else 1.0
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
    grad_fn = lambda params, _: gradient_at(params, step)  # noqa: E731
    updates, state = optimizer.update(gradient_at(params, step), state, params, grad_fn=grad_fn)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(advance, (params, state), jnp.arange(len(FACTORS), dtype=float))
  return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_follows_its_formula(name):
  with jax.enable_x64(True):
    traced = jax.tree.map(jnp.asarray, HPARAMS)
    got = jax.jit(functools.partial(run_optax, name))(traced, jax.tree.map(jnp.asarray, start_params()))
    # Seven steps in float64: about 1e-16 each, amplified by sums over 12 entries and Adam's square roots. Optax has Adafactor's
    # decay rates in float32, 6e-8 each.
    rtol = 1e-6 if name == "adafactor" else 1e-12
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), got, run_formula(name))


def test_formulas_differ():
  """No two optimizers share a formula here but for those that should, so that the test above tells them apart."""
  ends = {name: run_formula(name)["kernel"] for name in OPTIMIZERS}
  for one, other in itertools.combinations(OPTIMIZERS, 2):
    apart = np.max(np.abs(ends[one] - ends[other]))
    # The three LARS move a layer by some 1e-3 of itself; rounding is 1e-12.
    assert (apart == 0) if EQUAL.get(other) == one else (apart > 1e-5), (one, other)


def test_a_buffer_that_holds_steps_needs_its_correction():
  """Goyal et al. (2017), remark 2: with a rate that changes, `momentum` of steps without the quotient is another method."""
  lr, m, *_ = HPARAMS
  params, velocity = start_params()["kernel"], 0.0
  for step, factor in enumerate(FACTORS):
    grad = gradient_at({"bias": 0.0, "kernel": params}, step)["kernel"] + HPARAMS.weight_decay * params
    velocity = m * velocity + lr * factor * grad
    params = params - velocity
  assert np.max(np.abs(params - run_formula("momentum")["kernel"])) > 0.1


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
  optimizer = make_optimizer(name, HPARAMS, make_schedule("constant", HPARAMS))
  zeros = optax.tree.zeros_like(params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params, grad_fn=lambda params, _: zeros)
  np.testing.assert_array_equal(updates["bias"], 0)
  np.testing.assert_array_equal(updates["scale"], 0)
  shrinkage = -updates["kernel"] / params["kernel"]
  nesterov = 0.3 * 0.5 * 1.8
  # lars_2017 divides the decay's own pull by lambda |w|: 0.001 of the weight, as lars does. Adam makes signs of it.
  expected = {"lars": 0.3e-3, "lars_2017": 0.3e-3, "nesterov": nesterov, "nesterov_absorbed": nesterov}
  expected |= dict.fromkeys(("lamb", "lamb_v3", "lars_2019"), 0.3)
  if name == "adam":
    pull = 0.5 * np.abs(start_params()["kernel"])
    expected["adam"] = 0.3 * pull / (pull + HPARAMS.epsilon) / np.abs(start_params()["kernel"])
  # Five float32 roundings of 6e-8; Muon's normalised zero matrix stays zero.
  np.testing.assert_allclose(shrinkage, expected.get(name, 0.3 * 0.5), rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_to_do_is_no_step(name):
  """Zero parameters and a zero gradient: no quotient of zeros."""
  params = optax.tree.zeros_like(jax.tree.map(jnp.asarray, start_params()))
  optimizer = make_optimizer(name, HPARAMS, make_schedule("constant", HPARAMS))
  updates, _ = optimizer.update(params, optimizer.init(params), params, grad_fn=lambda params, _: params)
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(("name", "published"), [("adam", 1e-8), ("adamw", 1e-8), ("lamb", 1e-6)])
@pytest.mark.parametrize("given", [0.0, 3e-6])
def test_epsilon_is_the_published_one_unless_it_is_given(name, published, given):
  """Adam's first step is eta g / (|g| + epsilon), here of a bias, which no trust ratio scales."""
  hparams = Hparams(learning_rate=0.1, epsilon=given)
  optimizer = make_optimizer(name, hparams, make_schedule("constant", hparams))
  params, grads = {"bias": jnp.zeros(2)}, {"bias": jnp.full(2, 1e-6)}
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  # a dozen float32 roundings; the two epsilons differ by half of the step
  np.testing.assert_allclose(updates["bias"], -0.1 * 1e-6 / (1e-6 + (given or published)), rtol=1e-5)


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match="'rmsprop'; use one of sgd, momentum, momentum_absorbed, nesterov"):
    make_optimizer("rmsprop", HPARAMS, make_schedule("constant", HPARAMS))
