#!/usr/bin/env bash
# From a fresh clone to a measured answer: sets up .venv by itself, then runs the study of the embedded digits.
# Further arguments go to the study, for example --out=runs/other.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up requirements.txt
echo "running: python -m experiments.batch_size_study --workload=digits_mlp --out=runs/demo $*"
echo "(a few minutes on two CPU cores; stop it at any time, the same command continues)"
exec python -m experiments.batch_size_study --workload=digits_mlp --out=runs/demo "$@"
