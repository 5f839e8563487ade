"""What the command line checks before anything is made."""

import sys
from types import SimpleNamespace

import pytest
from absl import flags

from bsjax.data import DataError
from bsjax.study.command import EXIT_BAD_INPUT, EXIT_INTERRUPTED, check_spread, forced_data_path, lane_plan, run_command
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


def test_data_paths_go_by_name():
  assert forced_data_path("auto") is None
  assert forced_data_path("streamed") == "streamed"
  with pytest.raises(ValueError, match="--data_path=disk, wanted one of auto, resident, streamed"):
    forced_data_path("disk")


def test_a_record_that_cannot_be_read_is_one_line_and_an_exit_code(monkeypatch, capsys):
  def run():
    raise DataError("example 7 of split 'train' of made_up cannot be read")

  monkeypatch.setattr(sys, "argv", ["experiment"])
  code = run_command(lambda: run, documentation="", module=__name__, flag_values=flags.FlagValues())
  assert code == EXIT_BAD_INPUT
  assert capsys.readouterr().err == "error: example 7 of split 'train' of made_up cannot be read\n"


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_an_interruption_is_one_line_while_data_are_prepared_too(monkeypatch, capsys, where):
  def interrupt():
    raise KeyboardInterrupt

  monkeypatch.setattr(sys, "argv", ["experiment"])
  prepare = interrupt if where == "prepare" else lambda: interrupt
  code = run_command(prepare, documentation="", module=__name__, flag_values=flags.FlagValues())
  assert code == EXIT_INTERRUPTED
  assert capsys.readouterr().err.startswith("interrupted: what is done is kept")
