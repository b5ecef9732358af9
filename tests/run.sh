#!/usr/bin/env bash
# Install megashear with the needs of its tests into .venv, then check style, types and behaviour:
#   bash tests/run.sh [--quick | --slow] [PYTEST ARGUMENT ...]
# --quick: no torchrun, no compiler, no training beyond seconds; for every commit.
# --slow: the full matrices and longer proofs too.
# Tests that need a GPU run if there is one. As many processes as cores, at most 8, share the tests; `-n 0` as an
# argument uses one. Ends with the twenty costliest tests, and the wall and CPU time of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh test
export PATH="$PWD/.venv/bin:$PATH"

expression="not slow"
case "${1:-}" in
    --quick) expression="not slow and not medium" && shift ;;
    --slow) expression="" && shift ;;
esac
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    expression="${expression:+$expression and }not gpu"
fi

ruff check .
ruff format --check --quiet .
codespell
mypy
cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
TIMEFORMAT=$'tests: %0R s by the clock, %0U s user and %0S s system CPU time'
time pytest -q -n "$((cores < 8 ? cores : 8))" --dist loadgroup -m "$expression" "$@"
