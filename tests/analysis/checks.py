"""What every finding must satisfy, whichever judge made it."""

import json
import re

import numpy as np

SERIES = {
  "variance_inverse_b": "step batch_size variance variance_sem predicted",
  "direction_stable": "step batch_size cosine cosine_sem predicted",
  "oscillation": "batch_size spread spread_sem curve_batch_size curve_examples curve_loss curve_trend",
  "more_steps": "batch_size seed steps fit_batch_size fit_steps perfect_steps fit_low fit_high"
  " s_min critical_batch_size critical_low critical_high",
  "generalizes": "budget batch_size seed test_accuracy",
  "flat_minima": "budget batch_size seed sharpness residual",
  "throughput": "batch_size repeat examples_per_second seconds_per_step knee",
  "linear_scaling": "batch_size learning_rate edge grid_batch_size grid_learning_rate grid_score rule_batch_size linear sqrt slope",
}
NOISE_SERIES = {
  "noise_grows": "batch_size learning_rate seed step examples_seen noise_scale low high dataset_noise_scale identified"
  " form_batch_size form_learning_rate form_seed form_step form_examples_seen form_value form_low form_high form_dataset form"
  " layer_batch_size layer_learning_rate layer_seed layer_step layer_examples_seen layer_noise_scale layer_low layer_high"
  " layer_dataset_noise_scale layer_identified layer"
  " setting_batch_size setting_learning_rate setting_seeds start end factor factor_low factor_high quantity",
  "estimators_agree": "route quantity step seed value exact sem z relative_error",
  "temperature": "branch phase seed examples_seen noise_scale factor_branch predicted factor factor_low factor_high"
  " after after_low after_high",
  "layernorm_predicts_total": "batch_size learning_rate seed step layernorm total slope log_factor correlation",
}


POINTS = "phase measure batch_size rate_part seed value error grad_norm train_loss test_error test_loss used batch_norm"
SHARP_SERIES = {
  "flat_measures": f"{POINTS} slope_phase slope_measure slope slope_low slope_high slope_verdict slope_points slope_cells"
  " spectrum_batch_size spectrum_rate_part spectrum_draw spectrum_node spectrum_weight",
  "flat_generalizes": f"{POINTS} tau_measure tau_verdict tau_points level"
  + "".join(
    f" {kind}tau {kind}tau_low {kind}tau_high" for kind in ("", "test_loss_", "partial_", "granulated_", "control_")
  ),
  "noise_escapes": "branch seed batch_size learning_rate step examples_seen top_eigenvalue converged keskar trace test_accuracy distance"
  " factor_branch factor_measure factor factor_low factor_high factor_seeds",
  "edge_of_stability": "batch_size learning_rate seed step examples_seen top_eigenvalue ratio batch_ratio gradient_ratio"
  " trial_batch_size trial_learning_rate trial_seed peak plateau plateau_share batch_peak batch_plateau state full_batch_size",
  "sharper_line": "path seed alpha train_loss train_accuracy test_loss test_accuracy"
  " rise_path rise_seed rise_small rise_large factor_path factor factor_low factor_high factor_seeds"
  " plane_solution plane_x plane_y plane_train_loss plane_train_accuracy plane_test_loss plane_test_accuracy"
  " random_solution random_direction random_x random_train_loss random_train_accuracy random_test_loss random_test_accuracy"
  " trajectory_solution trajectory_x trajectory_y trajectory_train_loss trajectory_train_accuracy trajectory_test_loss"
  " trajectory_test_accuracy checkpoint_solution checkpoint_x checkpoint_y checkpoint_step checkpoint_explained_x"
  " checkpoint_explained_y small_batch_size large_batch_size batch_norm",
}


def check(finding, claim_id, verdict):
  """What every finding must satisfy, whatever its verdict."""
  claim = finding.claim
  assert (claim.id, claim.figure, claim.verdict) == (claim_id, claim_id, verdict)
  assert set(finding.series) == set((SERIES | NOISE_SERIES | SHARP_SERIES)[claim_id].split())
  assert all(isinstance(array, np.ndarray) for array in finding.series.values())
  json.dumps(claim._asdict(), allow_nan=False)
  numbers = (claim.measured, claim.ci_low, claim.ci_high)
  if verdict != "inconclusive":
    assert claim.ci_low <= claim.measured <= claim.ci_high
    assert claim.n > 0
  assert all(x is None or type(x) is float for x in numbers)
  sentences = re.findall(r"[.](?= [A-Z]|$)", finding.reading)
  assert len(sentences) == 2, finding.reading
  assert finding.reading[0].isupper()
  assert "nan" not in finding.reading.lower()
  assert "  " not in finding.reading
  assert not re.search(r"-0\.0+\b", finding.reading)
