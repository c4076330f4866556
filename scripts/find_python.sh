#!/bin/sh
# Prints a command that runs Python >= 3.12, from $PYTHON, PATH, pyenv or uv; says what to do if there is none.
set -eu

suits() {
    "$@" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    suits "$PYTHON" && { echo "$PYTHON"; exit 0; }
    echo "PYTHON=$PYTHON is no Python of version 3.12 or newer (with the venv module)" >&2
    exit 1
fi
for version in 3.12 3.13 3.14; do
    suits "python$version" && { echo "python$version"; exit 0; }
    for pyenv in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
        suits "$pyenv" && { echo "$pyenv"; exit 0; }
    done
done
suits python3 && { echo python3; exit 0; }
if command -v uv >/dev/null 2>&1 && found=$(uv python find '>=3.12' 2>/dev/null) && suits "$found"; then
    echo "$found"
    exit 0
fi
cat >&2 <<'MESSAGE'
dsv3_jax needs Python 3.12 or newer, and none was found on PATH, in pyenv or in uv.
Install one, for example with `uv python install 3.12`, `pyenv install 3.12` or your system's
packages (python3.12 and python3.12-venv), or point to it: make train PYTHON=/path/to/python3.12
MESSAGE
exit 1
