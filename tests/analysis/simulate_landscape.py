"""Rows of landscapes with a known answer: parabolas around two solutions."""

import numpy as np

STUDY = {"workload": "simulated", "escape": {"small": 32, "large": 1024}}
SEEDS = (0, 1, 2, 3, 4)
ALPHAS = np.linspace(-1, 2, 25)
GRID = np.linspace(-1, 1, 9)
STEEPNESS = {"line": 0.2, "curve": 0.7, "random": 0.5}
"""Loss around a small-batch solution: floor + steepness x distance^2."""
FLOOR = {"small": 0.01, "large": 0.04}


def row(name, loss, *, batch_norm="none", **point) -> dict:
  """Returns a row as the study writes it."""
  metrics = {"train_loss": loss, "train_accuracy": np.exp(-loss), "test_loss": loss + 0.05, "test_accuracy": 0.5}
  return {"landscape": name, **point, **metrics, "batch_norm": batch_norm}


def path_loss(kind, x, factor) -> float:
  """Parabolas around 0 and 1 that meet half-way."""
  if x < 0.5:
    return FLOOR["small"] + STEEPNESS[kind] * x**2
  return FLOOR["large"] + factor * STEEPNESS[kind] * (x - 1) ** 2


def paths(factors, *, curve=6.0, batch_norm="none") -> dict[str, list[dict]]:
  """Returns a line and a curve for each seed; around the large-batch solution the line is `factors[seed]` times as steep."""
  return {
    f"{kind}_{seed}": [
      row(f"{kind}_{seed}", path_loss(kind, x, each), batch_norm=batch_norm, x=x, y=0.0) for x in ALPHAS.tolist()
    ]
    for seed, factor in enumerate(factors)
    for kind, each in (("line", factor), ("curve", curve))
  }


def surroundings(*, factor=2.0) -> dict[str, list[dict]]:
  """Returns planes, random lines in three directions, and trajectories with their planes."""
  found: dict[str, list[dict]] = {}
  for solution, steepness in (("small", STEEPNESS["random"]), ("large", factor * STEEPNESS["random"])):
    floor = FLOOR[solution]
    grid = [(x, y) for y in GRID.tolist() for x in GRID.tolist()]
    name = f"random_{solution}"
    found[name] = [row(name, floor + steepness * (x**2 + 4 * y**2), x=x, y=y) for x, y in grid]
    name = f"random_line_{solution}"
    found[name] = [
      row(name, floor + steepness * 1.5**direction * x**2, direction=direction, x=x, y=0.0)
      for direction in (-1, 0, 1)
      for x in GRID.tolist()
    ]
    name = f"trajectory_{solution}"
    found[name] = [row(name, floor + 3 * (x**2 + y**2), x=2 * x, y=y) for x, y in grid]
    found[f"path_{solution}"] = [
      {"landscape": f"path_{solution}", "x": 1.5 * part, "y": 0.8 * part**2, "step": int(100 * (1 - part))}
      | {"explained_x": 0.9, "explained_y": 0.08}
      for part in (1.0, 0.6, 0.3, 0.1, 0.0)
    ]
  return found


def factors(factor, *, spread=0.1) -> np.ndarray:
  """Scatters a factor over the seeds, by an exact standard deviation of its logarithm."""
  noise = np.random.default_rng(3).normal(size=len(SEEDS))
  return factor * np.exp(spread * (noise - noise.mean()) / noise.std(ddof=1))
