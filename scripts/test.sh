#!/usr/bin/env bash
# Runs the whole test suite; sets up .venv by itself if needed. Arguments go to pytest, for example: tests/train -k resume
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up requirements.txt requirements-dev.txt
export JAX_PLATFORMS=cpu
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/bsjax/xla-tests}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
# The tests of a file share what they prepare, so they stay together.
options=(-n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder)
echo "running: python -m pytest ${options[*]} $*"
exec python -m pytest "${options[@]}" "$@"
