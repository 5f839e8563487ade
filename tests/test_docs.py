"""The code blocks of the docs run, and say what they say."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["data.md", "noise.md", "curvature.md"])
def test_examples_of_the_docs(name: str) -> None:
  failed, tried = doctest.testfile(str(DOCS / name), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
  assert tried > 0
  assert failed == 0
