# Sourced by the scripts: sets $python to an interpreter with what they need.
#
# That of the active environment ($VIRTUAL_ENV). Without one, or if
# DELTANET_PYTHON names an interpreter to make it with, that of .venv, made from
# requirements.txt.

# huge pages for the large temporaries of a training step: without them a CPU
# spends a third of its time on page faults (needs glibc 2.35)
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

make_env() { # ROOT MODULES...: modules that the active environment must have
  local root=$1 base version stamp missing
  shift
  base=${DELTANET_PYTHON:-}
  if [ -z "$base" ] && [ -n "${VIRTUAL_ENV:-}" ] &&
    [ ! "$VIRTUAL_ENV" -ef "$root/.venv" ]; then
    python=$VIRTUAL_ENV/bin/python
    missing=bin/python
    [ -x "$python" ] && missing=$(_missing "$@")
    if [ -n "$missing" ]; then
      echo "error: the active environment $VIRTUAL_ENV has no $missing;" \
        "pip install -r requirements.txt there, or leave it with deactivate" >&2
      return 2
    fi
    return
  fi
  if [ -z "$base" ]; then
    # the newest first
    for base in python3.13 python3.12 python3.11 python3 none; do
      _new_enough "$base" && break
    done
  fi
  if ! _new_enough "$base"; then
    version=$(python3 --version 2>&1 || echo 'no python3')
    echo "error: Python 3.11 or newer is needed and there is $version;" \
      "install one, or give its path as DELTANET_PYTHON" >&2
    return 2
  fi
  python=$root/.venv/bin/python
  # a checksum of what is installed: nothing to do if it is the same
  stamp=$(cksum <"$root/requirements.txt")
  if [ -x "$python" ] && [ "$(cat "$root/.venv/stamp" 2>&1)" = "$stamp" ]; then
    return
  fi
  echo "making .venv and installing requirements.txt (a minute or two)" >&2
  "$python" -m pip --version >/dev/null 2>&1 ||
    "$base" -m venv --clear "$root/.venv"
  "$python" -m pip install --quiet --disable-pip-version-check \
    -r "$root/requirements.txt"
  echo "$stamp" >"$root/.venv/stamp"
}

_missing() { # MODULES...: the first one that $python cannot find
  "$python" -c 'import importlib.util, sys
found = importlib.util.find_spec
print(next((name for name in sys.argv[1:] if not found(name)), ""))' "$@"
}

_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}
