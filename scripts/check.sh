#!/usr/bin/env bash
# Lint, format, types and tests: all that must pass before a change lands.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up requirements.txt requirements-dev.txt
echo "lint";   ruff check .
echo "format"; ruff format --check .
echo "types";  mypy
exec bash scripts/test.sh "$@"
