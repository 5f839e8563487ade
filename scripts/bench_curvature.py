"""What does curvature cost: Hessian products against gradients, eigenvalues and Keskar's sharpness against other tools.

  python -m scripts.bench_curvature                                 all cases, an hour on one core (PyHessian is most of it)
  python -m scripts.bench_curvature --only=top10_mlp512 --versus=scipy    one case against one opponent
  python -m scripts.bench_curvature --only=top1_mlp512 --versus=bare_hvps --data=mnist --num_examples=4000
  python -m scripts.bench_curvature --smoke                         two repetitions of the cheapest comparisons

Prints one JSON object per case and opponent. `ratio` is our time over theirs, below 1 is faster: the median of the ratios of
alternating repetitions, `low` and `high` the smallest and the largest, `n` their number. On the CPU the process is pinned to
one core and times are CPU times of all its threads; elsewhere wall times. Compilation is not timed.

Cases and opponents, all in float32 with the same weights, data and chunks:
  hvp_*     one Hessian-vector product (of a block of 8: per vector) / grad, one gradient of the same data. `our_error` and
            `their_error` are |a - b| / |b| against float64; `floor` is the same ratio in FLOP, counted by hand.
  topK_*    the K largest eigenvalues with vectors, to a relative error of 1e-4 in each value
    bare_hvps   as many products as ours made, one after the other in one compiled loop
    scipy       eigsh on our jitted product       matfree      tridiag_sym with the fewest steps that suffice
    curvlinops  eigsh on HessianLinearOperator    pyhessian    power iteration with deflation
            Errors are the largest relative error of a value against float64, residuals the largest |H v - lambda v| / |lambda| by
            a side's own product. Every side that takes a tolerance, ours too, gets the loosest of `TOLERANCES` that reaches
            1e-4; a side that reaches it with none gets the tightest, and its error shows it.
  density_* the moments of a spectral density: 4 probes of 40 products each / matfree, its Lanczos from the same probes
  trace_*   Hutchinson's estimate from 16 probes / matfree, its estimator as it is, all probes at once; / matfree_map, the
            parts of its estimator in a loop over probes. Beside each other: values, standard errors over the probes, and the MiB of
            temporary memory that XLA allots to a program.
  keskar_*  Keskar's sharpness / scipy_lbfgsb, the paper's 10 iterations: a row for each space, box and number of our `restarts`; with none
            both sides start from one and the same point. Each repetition is another solution with another key. `our_maxima` and
            `their_maxima` are in percent, `no_lower` is the fraction in which ours is no lower; the errors are what the linear
            model still promises at the maximum found, in percent again.
"""
# ruff: noqa: E402  (the process is pinned before JAX is imported)

import os

_ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
if _ALL_CORES:
  os.sched_setaffinity(0, {max(_ALL_CORES)})  # before JAX starts as many threads as there are cores

import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

from bsjax.probes import (
  eigenpairs,
  hessian_block_product,
  hessian_vector_product,
  hutchinson_trace,
  mean_gradient,
  spectral_quadrature,
)
from bsjax.probes.keskar import keskar_sharpness, keskar_sharpness_lbfgsb
from bsjax.probes.spectrum import Matvec
from bsjax.types import Array, Batch, Key, Params
from scripts import curvature_problems as problems
from scripts.curvature_peers import (
  curvlinops_side,
  loosest,
  matfree_density,
  matfree_map_trace,
  matfree_side,
  matfree_trace,
  pyhessian_side,
  scipy_side,
)
from scripts.curvature_problems import (
  WORK,
  Estimate,
  Side,
  compared,
  estimating_side,
  flat_product,
  in_float64,
  moments,
  normal_like,
  relative_error,
  trained,
)
from scripts.noise_problems import Problem, clock, seconds

BLOCK = 8
TOLERANCES = tuple(10 ** -(1 + quarter / 4) for quarter in range(17))
PYHESSIAN_TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
"""Of the change of a value from one iteration to the next; the first is its default."""
SPACES = {"full": None, "subspace": 100}
BOXES = (1e-3, 5e-4)
RESTARTS = (0, 1)

HVP_CASES = ("hvp_mlp512", "hvp_cnn", "hvp_transformer", "hvp_block8_mlp512")
TOP_CASES = {"top1_mlp512": (1, 20), "top10_mlp512": (10, 40)}
"""Eigenvalues, and the products that our side may make at most; it holds that many vectors."""
PROBE_CASES = ("density_mlp512", "trace_mlp512")
DENSITY_PROBES, DENSITY_MATVECS, TRACE_PROBES = 4, 40, 16
KESKAR_CASES = ("keskar_mlp512", "keskar_cnn")
CASES = (*HVP_CASES, *TOP_CASES, *PROBE_CASES, *KESKAR_CASES)
OPPONENTS = ("grad", "bare_hvps", "scipy", "matfree", "matfree_map", "curvlinops", "pyhessian", "scipy_lbfgsb")
SMOKE = {"hvp_mlp512": ["grad"], "top1_mlp512": ["bare_hvps", "scipy"]}

_ONLY = flags.DEFINE_list("only", list(CASES), "Cases to run.")
_VERSUS = flags.DEFINE_list("versus", list(OPPONENTS), "Opponents to run against.")
_REPEATS = flags.DEFINE_integer(
  "repeats", 7, "Alternating repetitions per ratio; solutions for Keskar's.", lower_bound=1
)
_SMOKE = flags.DEFINE_bool("smoke", False, "Run two repetitions of the cheapest comparisons.")
_DATA = flags.DEFINE_enum("data", "digits", ["digits", "mnist", "fashion_mnist"], "Images for MLP and CNN.")
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 1000, "Images for the MLP.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where they lie; digits need no files.")
flags.register_validator("only", lambda names: set(names) <= set(CASES), f"wanted some of {', '.join(CASES)}")
flags.register_validator("versus", lambda names: set(names) <= set(OPPONENTS), f"wanted some of {', '.join(OPPONENTS)}")


@functools.cache
def problem_of(network: str) -> Problem:
  if network == "transformer":
    return problems.transformer()
  if network == "cnn":
    return problems.cnn(_DATA.value, _DATA_DIR.value)
  return problems.mlp512(_DATA.value, _DATA_DIR.value, _NUM_EXAMPLES.value)


# Products.


def vector_product(problem: Problem, params: Params, examples: Batch, vector: Params) -> Params:
  return hessian_vector_product(problem.loss_fn, params, examples, vector, chunk_size=problem.chunk_size)


def block_product(problem: Problem, params: Params, examples: Batch, vectors: Params) -> Params:
  return hessian_block_product(problem.loss_fn, params, examples, vectors, chunk_size=problem.chunk_size)


def gradient(problem: Problem, params: Params, examples: Batch) -> Params:
  return mean_gradient(problem.loss_fn, params, examples, chunk_size=problem.chunk_size)[1]


def jax_side(function: Callable[..., Params], problem: Problem, *rest: Any) -> tuple[Side, np.ndarray]:
  """Compiles `function(problem, params, examples, *rest)`; returns it with the result in float64."""
  arguments = problem.params, problem.examples, *rest
  compiled = jax.jit(functools.partial(function, problem)).lower(*arguments).compile()
  with jax.enable_x64(True):
    truth = in_float64(jax.jit(functools.partial(function, problem))(*in_float64(arguments)))
  return Side(lambda: jax.block_until_ready(compiled(*arguments)), flat), flat(truth)


def flat(tree: Params) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def distance(found: np.ndarray, truth: np.ndarray) -> float:
  return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def run_hvp(case: str, repeats: int) -> None:
  network = case.split("_")[-1]
  problem = problem_of(network)
  count = BLOCK if "block" in case else 1
  function = block_product if count > 1 else vector_product
  ours, our_truth = jax_side(function, problem, normal_like(problem, count if count > 1 else None))
  theirs, their_truth = jax_side(gradient, problem)
  errors = {
    "our_error": distance(ours.read(ours.call()), our_truth),
    "their_error": distance(theirs.read(theirs.call()), their_truth),
  }
  times = alternate(ours.call, theirs.call, repeats)
  work, examples = WORK[network], len(problem.examples["label"])
  mine = statistics.median(mine for mine, _ in times) / count
  show(
    case,
    "grad",
    [(mine / count, other) for mine, other in times],
    errors
    | {
      "floor": work.products(count) / count / work.gradient(),
      "gflops": work.products(count) / count * examples / mine * 1e-9,
      "gflops_theirs": work.gradient() * examples / statistics.median(other for _, other in times) * 1e-9,
    },
  )


# Eigenvalues.


def our_side(problem: Problem, num_top: int, max_matvecs: int) -> Callable[[float], Side]:
  """Compiles our side once for all tolerances."""

  @jax.jit
  def run(params: Params, examples: Batch, start: Params, tolerance: Array) -> Any:
    matvec = functools.partial(vector_product, problem, params, examples)
    return eigenpairs(matvec, start, num_top=num_top, max_matvecs=max_matvecs, tolerance=tolerance)

  data = problem.params, problem.examples, normal_like(problem)
  compiled = run.lower(*data, jnp.float32(0)).compile()
  return lambda tolerance: Side(
    lambda: jax.block_until_ready(compiled(*data, jnp.float32(tolerance))),
    lambda pairs: np.asarray(pairs.values),
    lambda pairs: np.asarray(pairs.residuals / np.abs(pairs.values)),
    lambda pairs: {"our_tolerance": tolerance, "our_matvecs": int(pairs.num_matvecs)},
  )


def bare_side(problem: Problem, num_products: int, scale: float) -> Side:
  """One product after the other; `scale` keeps the numbers within float32."""

  @jax.jit
  def run(params: Params, examples: Batch, vector: Params, scale: float) -> Params:
    def advance(_: int, vector: Params) -> Params:
      return optax.tree.scale(scale, vector_product(problem, params, examples, vector))

    return jax.lax.fori_loop(0, num_products, advance, vector)

  arguments = problem.params, problem.examples, normal_like(problem), jnp.float32(scale)
  compiled = run.lower(*arguments).compile()
  return Side(
    lambda: jax.block_until_ready(compiled(*arguments)), flat, None, lambda _: {"their_matvecs": num_products}
  )


def true_values(num_top: int) -> np.ndarray:
  """The largest eigenvalues in float64, by ARPACK to 1e-8."""
  problem = problem_of("mlp512")
  with jax.enable_x64(True):
    product = flat_product(problem._replace(params=in_float64(problem.params), examples=in_float64(problem.examples)))
    start = in_float64(ravel_pytree(normal_like(problem))[0])
    operator = LinearOperator((start.size,) * 2, matvec=lambda v: np.asarray(product(v.reshape(-1))), dtype=np.float64)
    return eigsh(operator, k=num_top, which="LA", v0=start, tol=1e-8, return_eigenvectors=False)[::-1]


def run_top(case: str, versus: list[str], repeats: int) -> None:
  problem, (num_top, max_matvecs) = problem_of("mlp512"), TOP_CASES[case]
  truth = true_values(num_top)
  ours = loosest(our_side(problem, num_top, max_matvecs), TOLERANCES, truth)
  found = ours.call()

  def tuned(make: Callable[[Problem, int, float], Side], tolerances: tuple[float, ...] = TOLERANCES) -> Side:
    return loosest(functools.partial(make, problem, num_top), tolerances, truth)

  makers: dict[str, Callable[[], Side]] = {
    "bare_hvps": lambda: bare_side(problem, ours.notes(found)["our_matvecs"], 1 / float(truth[0])),
    "scipy": lambda: tuned(scipy_side),
    "matfree": lambda: matfree_side(problem, num_top, truth),
    "curvlinops": lambda: tuned(curvlinops_side),
    "pyhessian": lambda: tuned(pyhessian_side, PYHESSIAN_TOLERANCES),
  }
  for opponent in versus:
    theirs = makers[opponent]()
    other = theirs.call()
    accuracy = {
      "our_error": relative_error(ours.read(found), truth),
      "our_residual": float(np.max(ours.residuals(found))),
      "their_error": relative_error(theirs.read(other), truth) if theirs.residuals else None,
      "their_residual": float(np.max(theirs.residuals(other))) if theirs.residuals else None,
    }
    times = alternate(ours.call, theirs.call, repeats)
    show(case, opponent, times, accuracy | ours.notes(found) | theirs.notes(other) | {"top": float(truth[0])})


# Densities and traces.


def our_density(matvec: Matvec, like: Params, key: Key) -> tuple[Array, Array]:
  return moments(*spectral_quadrature(matvec, like, key, num_probes=DENSITY_PROBES, num_matvecs=DENSITY_MATVECS))


def our_trace(matvec: Matvec, like: Params, key: Key) -> tuple[Array, Array]:
  found = hutchinson_trace(matvec, like, key, num_probes=TRACE_PROBES)
  return found.value[None], found.sem[None]


def run_probes(case: str, versus: list[str], repeats: int) -> None:
  problem = problem_of("mlp512")
  makers: dict[tuple[str, str], Callable[[], Estimate]] = {
    ("density_mlp512", "matfree"): lambda: matfree_density(DENSITY_PROBES, DENSITY_MATVECS),
    ("trace_mlp512", "matfree"): lambda: matfree_trace(TRACE_PROBES),
    ("trace_mlp512", "matfree_map"): lambda: matfree_map_trace(TRACE_PROBES),
  }
  ours = estimating_side(problem, our_density if case == "density_mlp512" else our_trace)
  for opponent in versus:
    if (case, opponent) in makers:
      theirs = estimating_side(problem, makers[case, opponent]())
      sides = {"our": ours, "their": theirs}
      found = {f"{who}_{name}": note for who, side in sides.items() for name, note in side.notes(side.call()).items()}
      show(case, opponent, alternate(ours.call, theirs.call, repeats), found)


# Keskar's sharpness.


def run_keskar(case: str, repeats: int) -> None:
  problem = problem_of(case.removeprefix("keskar_"))
  solutions = [(trained(problem, seed).params, problem.examples, jax.random.key(seed)) for seed in range(repeats)]
  for space, dim in SPACES.items():
    options = {"chunk_size": problem.chunk_size, "subspace_dim": dim}
    compiled = [our_maximiser(problem, num_restarts=number, **options) for number in RESTARTS]
    for eps in BOXES:
      lbfgsb = functools.partial(keskar_sharpness_lbfgsb, problem.loss_fn, eps=eps, **options)
      sides = [*(functools.partial(maximise, eps=eps) for maximise in compiled), lbfgsb]
      lbfgsb(*solutions[0], num_iterations=1)  # compiles
      runs = [[timed(side, *solution) for side in sides] for solution in solutions]
      for which, number in enumerate(RESTARTS):
        mine, others = ([run[side][1] for run in runs] for side in (which, -1))
        times = [(run[which][0], run[-1][0]) for run in runs]
        show(case, "scipy_lbfgsb", times, {"space": space, "eps": eps, "restarts": number} | compared(mine, others))


def our_maximiser(problem: Problem, **options: Any) -> Callable[..., Any]:
  """Compiles our search for any solution, key and eps."""

  @jax.jit
  def maximise(params: Params, examples: Batch, key: Any, eps: Any) -> Any:
    return keskar_sharpness(problem.loss_fn, params, examples, key, eps=eps, **options)

  arguments = problem.params, problem.examples, jax.random.key(0), jnp.float32(1)
  compiled = maximise.lower(*arguments).compile()
  return lambda params, examples, key, eps: jax.block_until_ready(compiled(params, examples, key, jnp.float32(eps)))


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
  start = clock()
  result = function(*arguments)
  return clock() - start, result


# Timing and printing.


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> list[tuple[float, float]]:
  ours(), theirs()
  return [(seconds(ours), seconds(theirs)) for _ in range(repeats)]


def show(case: str, versus: str, times: list[tuple[float, float]], more: dict[str, Any]) -> None:
  """Prints the row of one comparison."""
  ratios = [mine / other for mine, other in times]
  mine, other = (statistics.median(side) for side in zip(*times, strict=True))
  row = {
    "bench": "curvature",
    "case": case,
    "versus": versus,
    "ratio": statistics.median(ratios),
    "low": min(ratios),
    "high": max(ratios),
    "n": len(ratios),
    "device": jax.devices()[0].device_kind,
    "clock": "cpu, one core" if jax.default_backend() == "cpu" else "wall",
    "seconds": mine,
    "seconds_theirs": other,
    "data": None if "transformer" in case else _DATA.value,
    "num_examples": _NUM_EXAMPLES.value if "mlp512" in case else None,
  } | more
  print(json.dumps({key: rounded(value) for key, value in row.items()}))
  sys.stdout.flush()


def rounded(value: Any) -> Any:
  if isinstance(value, list):
    return [rounded(entry) for entry in value]
  return float(f"{value:.4g}") if isinstance(value, float) else value


def has_peer(name: str) -> bool:
  """Tells whether an opponent is installed and can run on JAX's kind of device, and says on stderr why not."""
  needed = {
    "matfree": ("matfree",),
    "matfree_map": ("matfree",),
    "curvlinops": ("curvlinops", "torch"),
    "pyhessian": ("pyhessian", "torch"),
  }
  missing = [package for package in needed.get(name, ()) if importlib.util.find_spec(package) is None]
  if missing:
    print(f"{name} needs {', '.join(missing)}, skipped: pip install -r requirements-bench.txt", file=sys.stderr)
    return False
  if "torch" in needed.get(name, ()):
    if jax.default_backend() != "cpu":
      print(f"{name} is compared on the CPU only, skipped", file=sys.stderr)
      return False
    import torch

    torch.set_num_threads(1)
  return True


def main(arguments: list[str]) -> None:
  if len(arguments) > 1:
    raise app.UsageError(f"unknown arguments {arguments[1:]}; options begin with --")
  if _ALL_CORES and jax.default_backend() != "cpu":
    os.sched_setaffinity(0, _ALL_CORES)
  repeats = 2 if _SMOKE.value else _REPEATS.value
  installed = [name for name in _VERSUS.value if has_peer(name)]
  for case in _ONLY.value:
    versus = [name for name in installed if not _SMOKE.value or name in SMOKE.get(case, [])]
    if case in HVP_CASES and "grad" in versus:
      run_hvp(case, repeats)
    elif case in KESKAR_CASES and "scipy_lbfgsb" in versus:
      run_keskar(case, repeats)
    elif case in PROBE_CASES:
      run_probes(case, versus, repeats)
    elif case in TOP_CASES:
      opponents = [name for name in versus if name in ("bare_hvps", "scipy", "matfree", "curvlinops", "pyhessian")]
      if opponents:
        run_top(case, opponents, repeats)


if __name__ == "__main__":
  app.run(main)
