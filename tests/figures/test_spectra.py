"""The figure of the Hessian's spectrum draws the densities of the quadratures it is given."""

import numpy as np
import pytest

from bsjax.analysis import Finding, density
from bsjax.analysis.claim import columns
from bsjax.figures import sharpness, spectra
from tests.figures.drawn import assert_draws_cleanly, texts_of
from tests.report.example import make_claim

NAMES = " ".join(f"spectrum_{name}" for name in ("batch_size", "rate_part", "draw", "node", "weight"))


def finding(rows):
  return Finding(make_claim("flat_measures"), columns(NAMES, rows), "a reading")


@pytest.fixture(scope="module")
def rows():
  """Three batch sizes at two rates, three draws each: a bulk at 0 and an outlier that grows with the batch size."""
  draw = np.random.default_rng(0)
  return [
    (size, part, number, node, weight)
    for size in (4, 32, 256)
    for part in (0.25, 1.0)
    for number in range(3)
    for node, weight in ((0.1 * draw.normal(), 0.9), (np.sqrt(size), 0.1))
  ]


def test_curves_are_densities_and_their_labels_batch_sizes(rows):
  figure = spectra.draw_spectra(finding(rows))
  assert [axes.get_title(loc="left").split(" × ")[0] for axes in figure.axes] == ["0.25", "1"]
  for axes, part in zip(figure.axes, (0.25, 1.0), strict=True):
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert set(lines) == {"B = 4", "B = 256"}  # the ends alone
    here = np.array([(node, weight) for size, at, _, node, weight in rows if (size, at) == (256, part)]).reshape(
      3, 2, 2
    )
    grid, drawn = lines["B = 256"].T
    expected, _, _ = density(here[..., 0], here[..., 1], grid, spectra.WIDTH * 16)
    np.testing.assert_allclose(drawn, np.maximum(expected, np.finfo(float).tiny))
    assert grid[0] < -0.1
    assert grid[-1] > 16
  assert sharpness.FURTHER_FIGURES["flat_measures"]["spectra"] is spectra.draw_spectra


def test_nothing_is_covered_or_cut_and_no_global_state_changes(rows):
  assert_draws_cleanly(spectra.draw_spectra, finding(rows))


@pytest.mark.parametrize("lost", ["all", "none measured"])
def test_without_spectra_the_figure_says_so(rows, lost):
  given = [] if lost == "none measured" else [(*row[:3], np.nan, row[4]) for row in rows]
  figure = spectra.draw_spectra(finding(given))
  assert "no data: a reading" in texts_of(figure)
