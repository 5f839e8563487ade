"""The eight claims of the batch-size study, in the order of the report."""

from collections.abc import Sequence

from bsjax.analysis.claim import Finding
from bsjax.analysis.claims_noise import judge_direction_stable, judge_oscillation, judge_variance_inverse_b
from bsjax.analysis.claims_rate import judge_linear_scaling, judge_throughput
from bsjax.analysis.claims_training import judge_flat_minima, judge_generalizes, judge_more_steps
from bsjax.records import Record

JUDGES = (
  judge_variance_inverse_b,
  judge_direction_stable,
  judge_oscillation,
  judge_more_steps,
  judge_generalizes,
  judge_flat_minima,
  judge_throughput,
  judge_linear_scaling,
)


def judge_all(study: dict, records: Sequence[Record]) -> list[Finding]:
  """Judges all eight claims; one without enough records is inconclusive and says what is missing.

  Args:
    study: what was asked and tuned, as `study.json` holds it: workload, target, batch_sizes, budgets, seeds, tuned rates.
    records: all trials, in any order. Only complete ones enter a mean; diverged ones count as failures of tuning and as never having
      reached the target.
  """
  return [judge(study, records) for judge in JUDGES]
