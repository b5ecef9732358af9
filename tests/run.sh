#!/usr/bin/env bash
# Install megashear with its tests' needs into .venv, then check style, types and behaviour:
#   bash tests/run.sh [--slow] [PYTEST ARGUMENT ...]
# --slow: the longer proofs too. Tests that need a GPU run where there is one. As many processes as cores, at most 8, share
# the tests; `-n 0` as an argument takes one.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh test
export PATH="$PWD/.venv/bin:$PATH"

expression="not slow"
if [ "${1:-}" = --slow ]; then
    expression=""
    shift
fi
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    expression="${expression:+$expression and }not gpu"
fi

ruff check .
mypy
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
pytest -q -n "$((cores < 8 ? cores : 8))" --dist loadgroup -m "$expression" "$@"
