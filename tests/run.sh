#!/usr/bin/env bash
# The fast tests, on every core, in the active environment or in .venv, which is
# made. Arguments go to pytest: bash tests/run.sh -k loss
# (-n0 for one process, as a debugger needs it)
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
make_env "$PWD" jax pytest xdist hypothesis
exec "$python" -m pytest -n auto --maxprocesses=8 --dist=worksteal \
  -m "not slow" "$@"
