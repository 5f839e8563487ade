"""Each named workload is loaded once, so that all tests of the experiments share its compiled programs."""

import functools
from collections.abc import Iterator

import pytest

from bsjax.workloads import WORKLOADS, Workload, load_workload
from experiments import (
  batch_size_study,
  large_batch,
  noise_scale,
  scaling_rules,
  sharp_minima,
  steps_to_result,
)

LOADING = (batch_size_study, large_batch, noise_scale, scaling_rules, sharp_minima, steps_to_result)


@pytest.fixture(scope="session", autouse=True)
def one_of_each_workload() -> Iterator[None]:
  """Keeps what `load_workload` made of a name; files of one's own may change between two calls."""
  named = functools.cache(load_workload)

  def load(name: str, **options: object) -> Workload:
    return (named if name in WORKLOADS else load_workload)(name, **options)

  with pytest.MonkeyPatch.context() as patch:
    for experiment in LOADING:
      patch.setattr(experiment, "load_workload", load)
    yield
