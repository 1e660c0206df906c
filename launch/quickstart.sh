#!/usr/bin/env bash
# Trains configs/quickstart.py and shows the results. Run again, it continues
# where it stopped, or shows the results again. Takes the flags of launch.train:
# --workdir=runs/other --config.data.path='texts/*.txt'
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
make_env "$PWD" jax grain
exec "$python" -m launch.quickstart --config=configs/quickstart.py "$@"
