"""What the command line checks before anything is made."""

from types import SimpleNamespace

import pytest

from bsjax.study.command import check_spread, lane_plan
from bsjax.train import PLANS


@pytest.mark.parametrize(("size", "neighbours"), [(12, "use 8 or 16"), (3, "use 8,"), (1023, "use 1016 or 1024")])
def test_a_batch_that_devices_cannot_share_names_its_neighbours(size, neighbours):
  mesh = SimpleNamespace(shape={"trial": 2, "data": 8})
  with pytest.raises(ValueError, match=f"--batch_sizes has {size}, which 8 devices cannot share equally: {neighbours}"):
    check_spread((16, size), mesh)
  check_spread((8, 16, 1024), mesh)
  check_spread((1, size), SimpleNamespace(shape={"trial": 8, "data": 1}))


def test_plans_go_by_name():
  assert lane_plan("auto") is None
  assert lane_plan("map") == PLANS["map"]
  with pytest.raises(ValueError, match="--plan=fast, wanted one of auto, sequential, map, vmap, map_of_vmap"):
    lane_plan("fast")
