"""From records to answers: steps to target, fits with intervals, judged claims, advice. Imports no JAX and no matplotlib."""

from bsjax.analysis.advice import Advice, advise
from bsjax.analysis.claim import Claim, Finding
from bsjax.analysis.claims import JUDGES, judge_all
from bsjax.analysis.claims_edge import judge_edge_of_stability
from bsjax.analysis.claims_escape import judge_noise_escapes
from bsjax.analysis.claims_estimators import judge_estimators_agree
from bsjax.analysis.claims_gradient_noise import judge_layernorm_predicts_total, judge_noise_grows
from bsjax.analysis.claims_landscape import judge_sharper_line
from bsjax.analysis.claims_large_batch import judge_cosine_helps, judge_lars_lamb_help, judge_warmup_needed
from bsjax.analysis.claims_noise import judge_direction_stable, judge_oscillation, judge_variance_inverse_b
from bsjax.analysis.claims_pretrain import judge_finetune_small, judge_pretrain_large, pretrain_table
from bsjax.analysis.claims_quality import judge_same_best_error
from bsjax.analysis.claims_rate import judge_linear_scaling, judge_throughput
from bsjax.analysis.claims_scaling import judge_no_rule_fits_all
from bsjax.analysis.claims_sharpness import judge_flat_generalizes, judge_flat_measures
from bsjax.analysis.claims_steps import (
  SweepRecords,
  judge_lr_sensitivity,
  judge_momentum_extends_scaling,
  judge_three_regimes,
)
from bsjax.analysis.claims_temperature import judge_temperature
from bsjax.analysis.claims_training import judge_flat_minima, judge_generalizes, judge_more_steps
from bsjax.analysis.fits import bootstrap_critical_batch_size, bootstrap_slope, fit_steps, knee, loglog_slope
from bsjax.analysis.large_batch import large_batch_table
from bsjax.analysis.measurements import measurements_table
from bsjax.analysis.phases import split_phases
from bsjax.analysis.selection import BestRate, best_rate, steps_to_target
from bsjax.analysis.spectral_density import density
from bsjax.analysis.table import results_table

__all__ = [
  "JUDGES",
  "Advice",
  "BestRate",
  "Claim",
  "Finding",
  "SweepRecords",
  "advise",
  "best_rate",
  "bootstrap_critical_batch_size",
  "bootstrap_slope",
  "density",
  "fit_steps",
  "judge_all",
  "judge_cosine_helps",
  "judge_direction_stable",
  "judge_edge_of_stability",
  "judge_estimators_agree",
  "judge_finetune_small",
  "judge_flat_generalizes",
  "judge_flat_measures",
  "judge_flat_minima",
  "judge_generalizes",
  "judge_lars_lamb_help",
  "judge_layernorm_predicts_total",
  "judge_linear_scaling",
  "judge_more_steps",
  "judge_lr_sensitivity",
  "judge_momentum_extends_scaling",
  "judge_no_rule_fits_all",
  "judge_noise_escapes",
  "judge_noise_grows",
  "judge_oscillation",
  "judge_pretrain_large",
  "judge_same_best_error",
  "judge_sharper_line",
  "judge_temperature",
  "judge_three_regimes",
  "judge_throughput",
  "judge_variance_inverse_b",
  "judge_warmup_needed",
  "knee",
  "large_batch_table",
  "loglog_slope",
  "measurements_table",
  "pretrain_table",
  "results_table",
  "split_phases",
  "steps_to_target",
]
