#!/usr/bin/env bash
# Runs one mmjax command on every worker of a Cloud TPU slice, or of several slices (multi-slice):
#   launch/tpu_pod.sh create --tpu=pod --type=v6e-16 --zone=us-east5-b [--slices=2] [--spot]   asks for the slices (queued resource)
#   launch/tpu_pod.sh run    --tpu=pod --zone=us-east5-b --config=configs/llava15.py:7b --workdir=gs://BUCKET/llava
#   launch/tpu_pod.sh logs   --tpu=pod --zone=us-east5-b     follows the run again, after the connection was lost
#   launch/tpu_pod.sh stop   --tpu=pod --zone=us-east5-b     ends it on all workers; mmjax saves first
#
#   --tpu=NAME[,NAME...]  the slices. `create --slices=2 --tpu=pod` makes pod-0 and pod-1: run with --tpu=pod-0,pod-1
#   --zone, --project     as for gcloud; its own configuration is used where they are left out
#   --dry-run             prints the commands and does nothing
#   anything else         is handed to python -m mmjax.main; gs://BUCKET/... of the workdir's bucket becomes the folder it is mounted as
#
# `run` copies this checkout (what git tracks or would track, as it is now), installs what is missing, mounts the bucket of the workdir, and
# starts only when all workers answer and see all chips. The run does not need the connection: Ctrl-C here stops it, a lost connection does
# not. The same command goes on from the last checkpoint. Worker 0's log is shown; each worker has its own in ~/mmjax-run/log.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
action=${1:---help}
tpu=
type=
slices=1
workdir=
dry=
place=()
options=()
arguments=()

fail() { echo "launch/tpu_pod.sh: $1" >&2; exit 1; }
note() { echo "---- $1" >&2; }
run() { # COMMAND: does it, or prints it
  [[ -n $dry ]] || { "$@"; return; }
  local word line=
  for word; do [[ $word =~ ^[-[:alnum:]_./:=,@+]+$ ]] && line+=" $word" || line+=" ${word@Q}"; done
  echo "${line# }"
}

(($# == 0)) || shift
for argument; do
  case $argument in
    --help | -h) action=--help ;;
    --tpu=*) tpu=${argument#*=} ;;
    --zone=* | --project=*) place+=("$argument") ;;
    --type=*) type=${argument#*=} ;;
    --slices=*) slices=${argument#*=} ;;
    --spot | --reserved) options+=("$argument") ;;
    --dry-run) dry=yes ;;
    *)
      [[ $argument != --workdir=* ]] || workdir=${argument#*=}
      arguments+=("$argument") ;;
  esac
done
case $action in
  create | run | logs | stop) ;;
  --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) fail "$action is none of create, run, logs and stop (--help tells more)" ;;
esac
[[ -n $tpu ]] || fail "which slice? say --tpu=NAME"
IFS=, read -ra nodes <<<"$tpu"

if [[ -z $dry ]]; then
  command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  [[ -n $(gcloud auth list --filter=status:ACTIVE --format='value(account)') ]] || fail "gcloud is not logged in: gcloud auth login"
fi
scratch=LOGS
if [[ -z $dry ]]; then scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT; fi

if [[ $action == create ]]; then
  case $type in # the software that a TPU's image carries
    v6e-*) runtime="v2-alpha-tpuv6e" ;;
    v5litepod-*) runtime="v2-alpha-tpuv5-lite" ;;
    v5p-*) runtime="v2-alpha-tpuv5" ;;
    v[234]-*) runtime="tpu-ubuntu2204-base" ;;
    *) fail "--type=$type: say for example v6e-16, v5litepod-16 or v5p-32" ;;
  esac
  node=(--node-id="$tpu")
  ((slices == 1)) || node=(--node-count="$slices" --node-prefix="$tpu")
  run gcloud compute tpus queued-resources create "$tpu" "${place[@]}" "${node[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" --scopes=cloud-platform "${options[@]}"
  note "it is there when its state is ACTIVE: gcloud compute tpus queued-resources describe $tpu ${place[*]}"
  exit 0
fi

# ---- the slices: how many workers and chips, and where worker 0 is
workers=()
devices=0
for slice in "${!nodes[@]}"; do
  facts=(gcloud compute tpus tpu-vm describe "${nodes[slice]}" "${place[@]}"
    --format="value[separator=' '](state,acceleratorType.basename(),networkEndpoints.len(),networkEndpoints[0].ipAddress)")
  if [[ -n $dry ]]; then run "${facts[@]}"; first=ADDRESS; devices=CHIPS; continue; fi
  answer=$("${facts[@]}") || fail "there is no slice ${nodes[slice]} here (zone and project: ${place[*]:-as gcloud is configured})"
  read -r is kind number address <<<"$answer"
  [[ $is == READY ]] || fail "${nodes[slice]} is $is, not READY; a preempted slice must be deleted and created again"
  workers+=("$number")
  first=${first:-$address}
  case $kind in # the number in a type counts chips, but for v4 and v5p, where it counts their halves
    v4-* | v5p-*) devices=$((devices + ${kind##*-} / 2)) ;;
    *) devices=$((devices + ${kind##*-})) ;;
  esac
  : "${type:=$kind}"
  [[ $kind == "$type" ]] || fail "${nodes[slice]} is a $kind and ${nodes[0]} a $type: the slices of one run are alike"
done

on_all() { # WHAT COMMAND: COMMAND in the checkout of every worker of every slice, at once; names the workers on which it failed
  local slice worker jobs=() job log failed=
  note "$1"
  for slice in "${!nodes[@]}"; do
    local several=
    ((${#nodes[@]} == 1)) ||
      several="export MEGASCALE_COORDINATOR_ADDRESS=$first MEGASCALE_NUM_SLICES=${#nodes[@]} MEGASCALE_SLICE_ID=$slice; "
    local ssh=(gcloud compute tpus tpu-vm ssh "${nodes[slice]}" "${place[@]}" --worker=all --output-directory="$scratch/$slice"
      --command="$several$2")
    if [[ -n $dry ]]; then run "${ssh[@]}"; continue; fi
    rm -rf "${scratch:?}/$slice" && mkdir "$scratch/$slice"
    "${ssh[@]}" >"$scratch/$slice/gcloud" 2>&1 </dev/null &
    jobs+=($!)
  done
  [[ -z $dry ]] || return 0
  for job in "${jobs[@]}"; do wait "$job" || true; done
  for slice in "${!nodes[@]}"; do
    for ((worker = 0; worker < workers[slice]; worker++)); do
      log=$scratch/$slice/$worker.log
      if grep -qsx "mmjax: done" "$log"; then continue; fi
      failed=yes
      if [[ ! -s $log ]] || grep -q "^ssh: \|Permission denied" "$log"; then
        echo "launch/tpu_pod.sh: worker $worker of ${nodes[slice]} does not answer:" >&2
        tail -qn 3 "$scratch/$slice/gcloud" "$log" >&2
      else
        echo "launch/tpu_pod.sh: worker $worker of ${nodes[slice]}:" >&2
        tail -n 12 "$log" >&2
      fi
    done
  done
  [[ -z $failed ]] || fail "$1: failed; nothing more was done"
}
on_worker() { echo "bash mmjax/launch/tpu_worker.sh $1"; }
stop() { on_all "stopping: every worker saves and ends" "$(on_worker stop)"; }
follow() {
  local code=0
  trap 'trap "" INT; stop' INT
  run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker=0 --command="$(on_worker follow)" || code=$?
  ((code != 255)) || fail "the connection was lost; the run goes on: launch/tpu_pod.sh logs --tpu=$tpu ${place[*]}"
  return "$code"
}
case $action in
  stop) stop; exit 0 ;;
  logs) follow; exit ;;
esac

# ---- run
busy="kill -0 \$(cat mmjax-run/pid) 2>/dev/null; then echo 'a run is going on: see launch/tpu_pod.sh logs, or stop'"
on_all "asking all workers" "if $busy; else mkdir -p mmjax && echo 'mmjax: done'; fi"
note "copying the checkout"
packing="git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -czf"
(cd "$root" && run bash -c "$packing $scratch/mmjax.tar.gz")
for node in "${nodes[@]}"; do run gcloud compute tpus tpu-vm scp "$scratch/mmjax.tar.gz" "$node:" "${place[@]}" --worker=all; done
emptied="find mmjax -mindepth 1 -maxdepth 1 ! -name .venv ! -name workdirs -exec rm -rf {} +"
on_all "installing" "$emptied && tar -xzf mmjax.tar.gz -C mmjax && $(on_worker setup)"
if [[ $workdir == gs://* ]]; then
  bucket=${workdir#gs://}
  bucket=${bucket%%/*}
  on_all "mounting the bucket" "$(on_worker "mount $bucket")"
  arguments=("${arguments[@]//"gs://$bucket/"/"../mmjax-buckets/$bucket/"}") # seen from the checkout
elif [[ -n $workdir ]]; then
  note "$workdir must be one and the same folder on all workers (NFS, Filestore), or gs://BUCKET/DIR"
elif ((${#nodes[@]} > 1 || ${workers[0]:-1} > 1)); then
  fail "say --workdir=gs://BUCKET/DIR: the workers of a slice share no disk"
fi
on_all "counting chips" "$(on_worker "check $devices")"
printf -v quoted ' %q' "${arguments[@]}"
on_all "starting" "$(on_worker "start$quoted")"
note "the log of worker 0 of ${nodes[0]}; the others: gcloud compute tpus tpu-vm ssh NAME --worker=N --command='tail -f mmjax-run/log'"
follow
