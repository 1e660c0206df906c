#!/usr/bin/env bash
# The fast tests. Arguments go to pytest: bash tests/run.sh -k loss
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
make_env "$PWD"
exec "$python" -m pytest -m "not slow" tests "$@"
