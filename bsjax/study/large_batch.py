"""The study of large batches from a plan to a report: tune every arm equally, train it at fresh seeds, judge, write."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from bsjax.analysis import judge_cosine_helps, judge_lars_lamb_help, judge_warmup_needed, large_batch_table
from bsjax.analysis.selection import score
from bsjax.records import Record, read_record, read_records, write_json
from bsjax.report import large_batch_page, write_experiment
from bsjax.study.large_batch_plan import (
  ARMS,
  BASELINE,
  FIRST_REPEAT_SEED,
  MOMENTUM,
  RECIPES,
  REPEATED_POINTS,
  REPEATS,
  Budget,
  LargeBatchPlan,
  arm_config,
  arm_hparams,
  arm_space,
  budget_of,
  recipe_point,
)
from bsjax.study.large_batch_progress import LargeBatchProgress
from bsjax.study.measure import split_metrics
from bsjax.study.plan import workload_facts
from bsjax.study.space import Space, describe_space, draw_points, edges_of, widen
from bsjax.study.sweep import SPACE_SEED
from bsjax.study.sweep_plan import FIRST_FINAL_SEED, MOST_WIDENINGS
from bsjax.train import Plan as LanePlan
from bsjax.train import make_trial, run_trials
from bsjax.train.pool import Probe
from bsjax.workloads import Workload

Point = Mapping[str, float]


class LargeBatchStudy(NamedTuple):
  """What every part of the study needs."""

  workload: Workload
  plan: LargeBatchPlan
  folder: Path
  mesh: Mesh
  provenance: dict[str, Any]
  progress: LargeBatchProgress
  probe: Probe
  lane_plan: LanePlan | None
  keep_final: bool = False
  """Whether the last states of final trials are kept."""
  look_steps: Callable[[Budget], tuple[int, ...]] = lambda budget: (budget.num_steps,)
  """The steps of a budget at which final trials are probed."""

  def budget(self, batch_size: int) -> Budget:
    """Returns the budget of a batch size."""
    return budget_of(self.plan, batch_size=batch_size, train_size=len(self.workload.train))

  @property
  def final_seeds(self) -> range:
    """The seeds that judge."""
    return range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + self.plan.final_seeds)

  def run(
    self, arm: str, batch_size: int, points: Sequence[Point], seeds: Sequence[int], *, kind: str, name: str = ""
  ) -> list[Record]:
    """Trains what is missing of some points, each at its seed, as an arm does; returns the records of all of them.

    Args:
      kind: "search", "repeat" or "final"; final trials look at the test set.
      name: what the records call the arm, where it is another name than that of the way it trains.
    """
    budget = self.budget(batch_size)
    looks = self.look_steps(budget) if kind == "final" else ()
    config = arm_config(arm, self.workload, batch_size=batch_size, budget=budget, look_steps=looks)
    trials = [make_trial(config, arm_hparams(arm, point), seed) for point, seed in zip(points, seeds, strict=True)]
    run_trials(
      self.workload,
      trials,
      self.folder,
      mesh=self.mesh,
      probe=self.probe,
      provenance={"kind": kind, "arm": name or arm} | self.provenance,
      on_progress=lambda steps: self.progress.advance(config, steps),
      plan=self.lane_plan,
      keep_final=self.keep_final and kind == "final",
    )
    return [read_record(self.folder / trial.id) for trial in trials]


def run_large_batch_study(
  workload: Workload,
  plan: LargeBatchPlan,
  out: Path,
  *,
  mesh: Mesh,
  environment: dict[str, Any],
  lane_plan: LanePlan | None = None,
) -> Path:
  """Runs the study into `out` and returns the path of the report.

  Args:
    out: a folder claimed by `open_folder`; trials go to `out/large_batch/`, results beside it.
    mesh: axes "trial" and "data".
    environment: versions, device, code revision and command line; shown in the report and kept in every `trial.json`.
    lane_plan: how many trials run side by side and in turn; None: the fastest.

  Holds: whatever is complete on disk is not computed again; what is trained depends on the plan and on earlier records only.
  """
  folder = out / "large_batch"
  folder.mkdir(exist_ok=True)
  measure = split_metrics(workload)
  searches = [(plan.reference_batch_size, BASELINE), *((size, arm) for size in plan.batch_sizes for arm in plan.arms)]
  with LargeBatchProgress(workload, plan, searches, followed=plan.batch_sizes) as progress:
    study = LargeBatchStudy(
      workload, plan, folder, mesh, environment, progress, lambda trial, state: [measure(state)], lane_plan
    )
    reference = plan.reference_batch_size
    baseline = tune_and_train(study, BASELINE, reference)
    entries: dict[str, dict[str, Any]] = {str(reference): {BASELINE: baseline}}
    for batch_size in plan.batch_sizes:
      here = {arm: tune_and_train(study, arm, batch_size) for arm in plan.arms}
      entries[str(batch_size)] = here | _follow_the_rule(study, baseline, batch_size)
  return report_large_batch_study(_describe(study, entries), folder, out, environment=environment)


def report_large_batch_study(
  description: dict[str, Any], folder: Path, out: Path, *, environment: dict[str, Any]
) -> Path:
  """Judges the records below `folder` and writes study.json, claims.json, results.csv, figures and report.html."""
  records = read_records(folder)
  states = [record.status["state"] for record in records]
  description = description | {"counts": {state: states.count(state) for state in ("complete", "diverged")}}
  write_json(out / "study.json", description)
  judges = (judge_warmup_needed, judge_cosine_helps, judge_lars_lamb_help)
  findings = [judge(description, records) for judge in judges]
  return write_experiment(
    out,
    large_batch_page(description, records, findings),
    findings=findings,
    environment=environment,
    rows=large_batch_table(description, records),
  )


def tune_and_train(study: LargeBatchStudy, arm: str, batch_size: int) -> dict[str, Any]:
  """Tunes an arm at a batch size, and trains the final seeds at what was chosen; returns its entry of `study.json`.

  Where every trial of the search diverged there is no point, and no final trial.
  """
  study.progress.begin(batch_size, arm)
  space, points, records = _search(study, arm, batch_size)
  best, mean_loss = _repeat_best(study, arm, batch_size, points, records)
  entry = {
    "num_steps": study.budget(batch_size).num_steps,
    "num_trials": len(points),
    "num_diverged": sum(record.status["state"] == "diverged" for record in records),
    "space": describe_space(space),
  }
  if best is None:
    return entry | {"point": None, "edges": {}, "validation_loss": None, "final": []}
  seeds = study.final_seeds
  finals = study.run(arm, batch_size, [best] * len(seeds), seeds, kind="final")
  return entry | {
    "point": dict(best),
    "edges": _rate_edge(space, best),
    "validation_loss": mean_loss,
    "final": [record.id for record in finals],
  }


def _search(study: LargeBatchStudy, arm: str, batch_size: int) -> tuple[Space, list[Point], list[Record]]:
  """Trains quasi-random points of a space, which is widened while one of its best rates sits on an edge; one trial each, seeds 0, 1, ..."""
  plan = study.plan
  space = arm_space(arm, plan, batch_size=batch_size, budget=study.budget(batch_size))
  points: list[Point] = [*draw_points(space, plan.num_trials, seed=SPACE_SEED)]
  records = study.run(arm, batch_size, points, range(len(points)), kind="search")
  for widening in range(MOST_WIDENINGS):
    wider, beyond = widen(space, _best_edge(space, points, records))
    if wider == space:
      break
    more = draw_points(beyond, -(-plan.num_trials // 4), seed=SPACE_SEED + 1 + widening)
    study.progress.expect_more(batch_size, len(more))
    records += study.run(arm, batch_size, more, range(len(points), len(points) + len(more)), kind="search")
    points, space = [*points, *more], wider
  return space, points, records


def _best_edge(space: Space, points: Sequence[Point], records: Sequence[Record]) -> dict[str, str]:
  """Names the edge that the best of the points sits on which are to be repeated; where all trials diverged, rates were too large."""
  best = _ranked(records)[:REPEATED_POINTS]
  edges = [edge for number in best if (edge := _rate_edge(space, points[number]))]
  return edges[0] if edges else {} if best else {"learning_rate": "low"}


def _rate_edge(space: Space, point: Point) -> dict[str, str]:
  """Names the edge of its space that a rate sits on. The ends of the warm-up's are part of the question, and no edges."""
  return {name: side for name, side in edges_of(space, point).items() if name == "learning_rate"}


def _loss(record: Record) -> float:
  """Returns what tuning minimises: the validation loss at the end of the budget; infinite for a trial that diverged."""
  return score(record, "validation_loss", {})


def _ranked(records: Sequence[Record]) -> list[int]:
  """Returns the numbers of the trials that did not diverge, the best first; the first of equals before the others."""
  alive = [number for number, record in enumerate(records) if math.isfinite(_loss(record))]
  return sorted(alive, key=lambda number: (_loss(records[number]), number))


def _repeat_best(
  study: LargeBatchStudy, arm: str, batch_size: int, points: Sequence[Point], records: Sequence[Record]
) -> tuple[Point | None, float | None]:
  """Trains the best points of a search again at fresh seeds, and returns the one with the lowest mean validation loss, and that mean.

  A point with a diverged repeat loses against any without; None where every trial of the search diverged.
  """
  best = [points[number] for number in _ranked(records)[:REPEATED_POINTS]]
  if not best:
    return None, None
  seeds = range(FIRST_REPEAT_SEED, FIRST_REPEAT_SEED + REPEATS)
  again = study.run(arm, batch_size, [point for point in best for _ in seeds], [*seeds] * len(best), kind="repeat")
  means = np.mean(np.reshape([_loss(record) for record in again], (len(best), REPEATS)), axis=1)
  chosen = int(np.argmin(means))
  return best[chosen], float(means[chosen]) if math.isfinite(means[chosen]) else None


def _follow_the_rule(study: LargeBatchStudy, baseline: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
  """Trains Goyal et al.'s recipe as it stands at the final seeds, from the baseline's rate; nothing if the baseline has none."""
  if baseline["point"] is None:
    return {}
  entries = {}
  for recipe, arm in RECIPES.items():
    study.progress.begin(batch_size, recipe)
    point = recipe_point(
      recipe,
      study.plan,
      baseline["point"]["learning_rate"],
      batch_size=batch_size,
      budget=study.budget(batch_size),
    )
    seeds = study.final_seeds
    finals = study.run(arm, batch_size, [point] * len(seeds), seeds, kind="final", name=recipe)
    entries[recipe] = {
      "num_steps": study.budget(batch_size).num_steps,
      "point": point,
      "final": [record.id for record in finals],
    }
  return entries


def _describe(study: LargeBatchStudy, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Builds `study.json`: what the records mean, for an analysis that sees nothing else."""
  workload, plan = study.workload, study.plan
  return {
    **workload_facts(workload),
    "target": workload.target._asdict(),
    "batch_sizes": list(plan.batch_sizes),
    "reference_batch_size": plan.reference_batch_size,
    "baseline": BASELINE,
    "arms": {name: {"optimizer": ARMS[name].optimizer, "weight_decay": ARMS[name].weight_decay} for name in plan.arms},
    "num_epochs": plan.num_epochs,
    "momentum": MOMENTUM,
    "num_trials": plan.num_trials,
    "repeats": [REPEATED_POINTS, REPEATS],
    "final_seeds": list(study.final_seeds),
    "tuned": entries,
  }
