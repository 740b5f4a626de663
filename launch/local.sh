#!/usr/bin/env bash
# Runs Python with everything mmjax needs:   launch/local.sh -m mmjax.main --config=configs/quickstart.py
#                                            launch/local.sh -m pytest
# The first call makes a virtual environment in .venv and installs into it (with the packages of the tests when the tests are what is
# run); later calls install again only after the requirements have changed. pip reads its own configuration: indexes, proxies
# and certificates set there are used. PYTHON=/path/to/python chooses the interpreter (3.11 or newer).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
extra=
[[ " $* " == *" -m pytest "* ]] && extra="test"

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [[ ! -x $venv/bin/pip ]]; then
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if new_enough "$candidate"; then python=$candidate; break; fi
  done
  if [[ -z ${python:-} ]]; then
    echo "launch/local.sh: Python 3.11 or newer is needed; say PYTHON=/path/to/python launch/local.sh ..." >&2
    exit 1
  fi
  "$python" -m venv "$venv" || { echo "launch/local.sh: making $venv failed (on Debian: apt install python3-venv)" >&2; exit 1; }
fi

# What is installed is remembered by the text that asked for it; the test packages include the others.
wanted=$(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum)
installed() { [[ -f $venv/installed-$1 && $(<"$venv/installed-$1") == "$wanted" ]]; }

if ! installed test && { [[ -n $extra ]] || ! installed run; }; then
  echo "Installing mmjax${extra:+ and its tests} into $venv (once; a few minutes)" >&2
  "$venv/bin/pip" install -qq --no-input --no-compile --disable-pip-version-check --editable "$root${extra:+[$extra]}"
  echo "$wanted" > "$venv/installed-${extra:-run}"
fi

# Containers often forbid it, but without bytecode on disk every process compiles all that it imports: 10 seconds and more.
export PYTHONDONTWRITEBYTECODE=
exec "$venv/bin/python" "$@"
