#!/usr/bin/env bash
# Install megashear from this checkout into .venv, which is made where it is missing:
#   bash tools/install.sh [EXTRA ...]
# EXTRA: optional dependencies of pyproject.toml (test, logs, evaluation, gguf, parquet). PYTHON: the interpreter to make
# .venv with (default: python3.11, python3.12 or python3, the first that is of a version that megashear supports).
# What is installed already is not installed again, unless this folder, pyproject.toml, setup.py or csrc/ have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

supported() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}

if [ ! -x .venv/bin/python ]; then
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if supported "$candidate"; then
            found=$candidate
            break
        fi
    done
    if [ -z "${found:-}" ]; then
        echo "install: no Python 3.11 or 3.12 with its venv module; on Debian: apt-get install python3 python3-venv" \
            "(and g++ python3-dev for the kernels), or name one: PYTHON=/path/to/python3.11" >&2
        exit 2
    fi
    "$found" -m venv .venv
elif ! supported .venv/bin/python; then
    echo "install: .venv is of another Python version than 3.11 and 3.12, or broken; remove it and start again" >&2
    exit 2
fi

# The mark: what the installation was made from, and what it built.
state() {
    {
        pwd
        .venv/bin/python --version
        sha256sum pyproject.toml setup.py megashear/__init__.py
        find csrc -type f -print0 | sort -z | xargs -0 sha256sum
        env | grep -E '^(MEGASHEAR_(CPU|CUDA|CUDA_ARCH)|CXX|CXXFLAGS|LDFLAGS|CUDA_HOME|NVCC_[A-Z_]+|CPATH|CPLUS_INCLUDE_PATH)=' | sort || true
        find megashear -maxdepth 1 -name '*.so' | sort
    } | sha256sum
}

# One mark for the package and one for each extra; the whole installation is made anew where one of them is not current.
missing=0
for extra in package "$@"; do
    [ "$(cat ".venv/installed-$extra" 2>/dev/null)" = "$(state)" ] || missing=1
done
if [ "$missing" -eq 1 ]; then
    echo "installing megashear into .venv: a few minutes the first time, most of them for torch"
    extras=$(IFS=, && echo "$*")
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    for extra in package "$@"; do
        state >".venv/installed-$extra"
    done
fi
