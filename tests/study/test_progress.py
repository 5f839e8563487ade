"""The bar counts to its end, never beyond, whatever the grids did."""

import pytest

from bsjax.study import make_plan
from bsjax.study.plan import make_config
from bsjax.study.progress import NOISE, TIMING, Progress
from bsjax.train import make_trial
from bsjax.types import Hparams
from bsjax.workloads import load_workload


@pytest.mark.parametrize("rates", [1, 3, 3000])
def test_the_bar_ends_at_its_end(rates: int) -> None:
  """Fewer, as many and far more trials than forecast: after the last part nothing is left, and before it something is."""
  workload = load_workload("quadratic")
  plan = make_plan(workload, batch_sizes=(8, 64), num_rates=3)
  with Progress(workload, plan) as progress:
    bar = progress._bar
    forecast = bar.total
    for batch_size in plan.batch_sizes:
      progress.begin(f"batch size {batch_size}")
      for budget in ("epochs", "steps"):
        config = make_config(plan, workload.name, budget, batch_size=batch_size, train_size=512)
        trials = [make_trial(config, Hparams(0.1 * (rate + 1)), seed) for rate in range(rates) for seed in range(3)]
        progress.expect(config, trials)
        once = bar.total
        progress.expect(config, trials)  # announced twice, counted once
        assert bar.total == once
        progress.advance(config, config.num_steps * len(trials))
        assert 0 < bar.n < bar.total
    progress.begin(NOISE)
    progress.begin(TIMING)
    assert 0 < bar.n < bar.total
    assert (bar.total < forecast) == (rates < 3000)  # the forecast of a part gives way to what it held
    for _ in plan.batch_sizes:
      progress.timed()
    assert bar.n == pytest.approx(bar.total)
