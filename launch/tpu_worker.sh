#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each worker of a TPU slice, in the checkout that it has copied there:
#   launch/tpu_worker.sh setup                 a virtual environment with mmjax and JAX's TPU build; again only what has changed
#   launch/tpu_worker.sh mount BUCKET          makes gs://BUCKET a folder, ~/mmjax-buckets/BUCKET, and writes into it to try it
#   launch/tpu_worker.sh check DEVICES         joins the other workers and counts the devices
#   launch/tpu_worker.sh start ARGUMENTS ...   python -m mmjax.main ARGUMENTS in the background; the log is ~/mmjax-run/log
#   launch/tpu_worker.sh follow                shows the log until the run ends, and ends with its exit code
#   launch/tpu_worker.sh stop                  SIGTERM: mmjax saves and ends; waits for that
# "mmjax: done" ends what succeeded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." # the checkout

state=$HOME/mmjax-run
patience=180 # seconds that a run gets to save

fail() { echo "mmjax: $1"; exit 1; }
running() { [[ -f $state/pid ]] && kill -0 "$(<"$state/pid")" 2>/dev/null; }

setup() {
  local python
  if [[ ! -x .venv/bin/pip ]]; then
    for python in python3.11 python3.12 python3.13 python3; do # first what the tests run on
      if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then export PYTHON=$python; break; fi
    done
    if [[ -z ${PYTHON:-} ]]; then # Ubuntu 22.04, which the TPU images stand on, comes with Python 3.10
      python3 -m pip install -q --user uv || fail "Python 3.11 or newer is needed, and uv, which would fetch it, could not be installed"
      python3 -m uv python install -q 3.11 || fail "Python 3.11 could not be fetched; sudo apt-get install python3.11-venv does as well"
      PYTHON=$(python3 -m uv python find 3.11)
      export PYTHON
    fi
  fi
  launch/local.sh -c pass || fail "installing mmjax failed"
  local release
  release=$(.venv/bin/python -c 'import importlib.metadata; print(importlib.metadata.version("jax"))')
  .venv/bin/pip install -qq --no-input --disable-pip-version-check "jax[tpu]==$release" || fail "installing jax[tpu]==$release failed"
}

mount_bucket() { # BUCKET
  local at=$HOME/mmjax-buckets/$1 trial
  command -v gcsfuse >/dev/null || sudo apt-get install -qq -y gcsfuse >/dev/null ||
    fail "gcsfuse is missing; install it as https://cloud.google.com/storage/docs/cloud-storage-fuse/install says"
  mkdir -p "$at"
  # No cache of what exists: each worker must see at once what another has written. Orbax puts a checkpoint in its place by renaming it.
  mountpoint -q "$at" || gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$1" "$at" >/dev/null ||
    fail "gs://$1 cannot be mounted: is the name right, and may the slice's service account read it?"
  trial=$at/.mmjax-$(hostname)
  { echo trial >"$trial" && rm "$trial"; } 2>/dev/null ||
    fail "gs://$1 is not writable: give the slice's service account roles/storage.objectUser on it, and the slice the scope cloud-platform"
}

start() { # ARGUMENTS ...
  ! running || fail "a run is going on on this worker already; launch/tpu_pod.sh stop ends it"
  mkdir -p "$state"
  rm -f "$state/exit" "$state/pid"
  echo "==== $(date -u +%FT%TZ) python -m mmjax.main $*" >>"$state/log"
  setsid nohup bash launch/tpu_worker.sh run "$@" >>"$state/log" 2>&1 </dev/null &
}

run() { # ARGUMENTS ...: what `start` leaves running
  local code=0
  .venv/bin/python -u -m mmjax.main "$@" &
  echo $! >"$state/pid"
  wait $! || code=$?
  echo "$code" >"$state/exit"
}

follow() {
  local i
  for ((i = 0; i < 50; i++)); do [[ ! -f $state/pid ]] || break; sleep 0.2; done
  [[ -f $state/pid ]] || fail "nothing was started on this worker"
  tail -n 20 -F --pid="$(<"$state/pid")" "$state/log" 2>/dev/null || true
  for ((i = 0; i < 50; i++)); do [[ ! -f $state/exit ]] || break; sleep 0.2; done
  [[ -f $state/exit ]] || fail "the run ended without an exit code: the worker was restarted or out of memory (sudo dmesg | tail)"
  echo "mmjax: the run ended with exit code $(<"$state/exit")"
  exit "$(<"$state/exit")"
}

stop() {
  running || return 0
  kill -TERM "$(<"$state/pid")"
  local i
  for ((i = 0; i < patience; i++)); do running || return 0; sleep 1; done
  kill -KILL "$(<"$state/pid")"
  fail "the run did not end within $patience s and was killed; it goes on from the checkpoint before"
}

case ${1:-} in
  setup) setup ;;
  mount) mount_bucket "$2" ;;
  check) timeout 600 .venv/bin/python -m launch.check --platform=tpu --devices="$2" || fail "the slice is not as expected" ;;
  start) shift; start "$@" ;;
  run) shift; run "$@"; exit ;;
  follow) follow ;;
  stop) stop ;;
  *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
echo "mmjax: done"
