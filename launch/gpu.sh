#!/usr/bin/env bash
# Runs mmjax on all GPUs of one machine:
#   launch/gpu.sh --config=configs/llava15.py:7b,lora --workdir=workdirs/llava                  one process that drives all GPUs
#   launch/gpu.sh --processes=8 --config=configs/llava15.py:7b,lora --workdir=workdirs/llava    one process for each GPU
#
# One process is JAX's natural way: it sees every GPU and starts nothing else. One process for each GPU reads and decodes data in as many
# Python interpreters, and is what several machines run; on one machine both compute the same. CUDA_VISIBLE_DEVICES, where it is set,
# says which GPUs there are. Without GPUs: JAX_PLATFORMS=cpu launch/gpu.sh --processes=2 ...
#
#   --processes=N   one process for each of the first N GPUs, joined over the loopback interface; the first one's log is shown, and
#                   when one fails its log's end is shown, the others are ended and its exit code is passed on
#   --logs=DIR      where the processes' logs go (default: logs/ in the workdir)
#   --dry-run       prints the commands and does nothing
#   -- COMMAND ...  runs COMMAND instead of python -m mmjax.main; it is given --coordinator, --processes and --process too
#
# Ctrl-C and SIGTERM are passed on: mmjax saves and stops, and the same command goes on from there. PYTHON=... chooses the interpreter
# (default: .venv/bin/python where launch/local.sh has made it).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3
command=("$python" -m mmjax.main)
processes=
logs=
dry=
workdir=workdirs
patience=30 # seconds that the others get to end once one process has failed

fail() { echo "launch/gpu.sh: $1" >&2; exit 2; }
show() {
  local word line=
  for word; do [[ $word =~ ^[-[:alnum:]_./:=,@+]+$ ]] && line+=" $word" || line+=" ${word@Q}"; done
  echo "${line# }"
}

(($#)) || set -- --help
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --processes=*) processes=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --dry-run) dry=yes ;;
    --) shift; (($#)) || fail "a command must follow --"; command=("$@"); break ;;
    *)
      [[ $1 != --workdir=* ]] || workdir=${1#*=}
      command+=("$1") ;;
  esac
  shift
done
logs=${logs:-$workdir/logs}
[[ -z $processes || $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes=$processes: a number is needed"

# ---- which GPUs there are
gpus=()
if [[ ${JAX_PLATFORMS:-} == cpu ]]; then
  :
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif listed=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null); then
  mapfile -t gpus <<<"$listed"
elif [[ -z $dry ]]; then
  fail "no NVIDIA driver answers here (nvidia-smi); on a machine without GPUs say JAX_PLATFORMS=cpu launch/gpu.sh ..."
fi
if ((${#gpus[@]} && ${processes:-1} > ${#gpus[@]})); then
  fail "--processes=$processes: there are ${#gpus[@]} GPUs (${gpus[*]}), and each process drives one"
fi

# ---- one process
if [[ -z $processes ]]; then
  [[ -z $dry ]] || { show "${command[@]}"; exit 0; }
  exec "${command[@]}"
fi

# ---- one process for each GPU
port=PORT
[[ -n $dry ]] || port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
words_of() { # PROCESS: sets `words` to its whole command
  words=(env)
  [[ ${JAX_PLATFORMS:-} == cpu ]] || words+=(CUDA_VISIBLE_DEVICES="${gpus[$1]:-$1}")
  words+=("${command[@]}" --coordinator="127.0.0.1:$port" --processes="$processes" --process="$1")
}
if [[ -n $dry ]]; then
  for ((i = 0; i < processes; i++)); do words_of "$i"; echo "$(show "${words[@]}") > $logs/$i.log"; done
  exit 0
fi

mkdir -p "$logs"
pids=()
stopping=
trap 'stopping=yes; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  words_of "$i"
  : >"$logs/$i.log"
  "${words[@]}" >>"$logs/$i.log" 2>&1 </dev/null &
  pids+=($!)
done
echo "launch/gpu.sh: $processes processes; the first one's log follows, the others' are in $logs" >&2
tail -n +1 -s 0.2 -f --pid="${pids[0]}" "$logs/0.log" &

code=0
deadline=
while ((${#pids[@]})); do
  sleep 0.2 || true # a signal to the whole group ends it too
  for i in "${!pids[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    ended=0
    wait "${pids[i]}" || ended=$?
    unset "pids[i]"
    ((ended)) && [[ $code == 0 ]] || continue
    code=$ended
    [[ -z $stopping ]] || continue
    echo "launch/gpu.sh: process $i failed (exit code $code); the end of $logs/$i.log:" >&2
    tail -n 25 "$logs/$i.log" >&2
    deadline=$((SECONDS + patience))
    ((${#pids[@]} == 0)) || kill -TERM "${pids[@]}" 2>/dev/null || true
  done
  if [[ -n $deadline ]] && ((SECONDS > deadline && ${#pids[@]})); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
done
wait
exit "$code"
