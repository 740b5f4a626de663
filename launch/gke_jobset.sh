#!/usr/bin/env bash
# Runs one mmjax command on TPU slices of a GKE cluster, as the JobSet in launch/gke_jobset.yaml:
#   launch/gke_jobset.sh --name=llava --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/mmjax --bucket=BUCKET \
#       --accelerator=tpu-v6e-slice --topology=4x4 --config=configs/llava15.py:7b --workdir=gs://BUCKET/llava
#   launch/gke_jobset.sh --dry-run ...    prints the filled-in JobSet and the commands, and does nothing
#
#   --name=NAME           of the JobSet
#   --image=IMAGE         made of launch/Dockerfile.tpu, in a registry that the cluster can read
#   --bucket=BUCKET       is /bucket in the container; paths gs://BUCKET/... in the command become /bucket/...
#   --accelerator=TYPE    tpu-v6e-slice (default) or tpu-v5-lite-podslice
#   --topology=TOPOLOGY   of a slice: 1x1 2x2 2x4 (one host), 4x4 4x8 8x8 8x16 16x16 (four chips a host)
#   --slices=N            default 1; each needs a node pool of its own
#   --service-account=SA  Kubernetes service account that may write to the bucket (default: default)
#   --restarts=N          after failures (default 3); preemptions are not counted
#   anything else         is handed to python -m mmjax.main
#
# Log: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0 -c mmjax
# Stop: kubectl delete jobset NAME (mmjax saves first). The same command goes on from the last checkpoint.
set -euo pipefail

template=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/gke_jobset.yaml
dry=
declare -A value=([ACCELERATOR]=tpu-v6e-slice [SLICES]=1 [SERVICE_ACCOUNT]="default" [RESTARTS]=3)
arguments=()

fail() { echo "launch/gke_jobset.sh: $1" >&2; exit 1; }

(($#)) || set -- --help
for argument; do
  case $argument in
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run) dry=yes ;;
    --name=* | --image=* | --bucket=* | --accelerator=* | --topology=* | --slices=* | --service-account=* | --restarts=*)
      key=${argument%%=*} key=${key#--} key=${key//-/_}
      value[${key^^}]=${argument#*=} ;;
    *) arguments+=("$argument") ;;
  esac
done
for key in NAME IMAGE BUCKET TOPOLOGY; do [[ -n ${value[$key]:-} ]] || fail "say --${key,,}=... (--help tells more)"; done
[[ ${value[NAME]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name=${value[NAME]}: small letters, digits and hyphens, at most 40"
[[ ${value[SLICES]} =~ ^[1-9][0-9]*$ && ${value[RESTARTS]} =~ ^[0-9]+$ ]] || fail "--slices and --restarts are numbers"
case ${value[ACCELERATOR]} in
  tpu-v6e-slice | tpu-v5-lite-podslice) ;;
  *) fail "--accelerator=${value[ACCELERATOR]}: tpu-v6e-slice (v6e) or tpu-v5-lite-podslice (v5e)" ;;
esac
case ${value[TOPOLOGY]} in
  1x1 | 2x2 | 2x4) value[HOSTS]=1 value[CHIPS]=$((${value[TOPOLOGY]/x/*})) ;;
  4x4 | 4x8 | 8x8 | 8x16 | 16x16) value[CHIPS]=4 value[HOSTS]=$((${value[TOPOLOGY]/x/*} / 4)) ;;
  *) fail "--topology=${value[TOPOLOGY]}: v5e and v6e slices are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16" ;;
esac
((value[SLICES] == 1 || value[HOSTS] > 1)) || fail "several slices of one host each cannot be joined: take a topology of 4x4 or more"

# ---- fill in: the arguments become a YAML list of quoted strings
list=
for argument in "${arguments[@]}"; do
  argument=${argument//gs:\/\/${value[BUCKET]}\//\/bucket\/}
  argument=${argument//\\/\\\\}
  list+="${list:+, }\"${argument//\"/\\\"}\""
done
[[ $list == *--workdir=/bucket/* || $list == *'"--job=plan"'* ]] ||
  fail "say --workdir=gs://${value[BUCKET]}/DIR: what a container writes elsewhere is lost"
text=$(<"$template")
for key in "${!value[@]}"; do text=${text//"\${$key}"/"${value[$key]}"}; done
text=${text//"\${ARGUMENTS}"/"[$list]"}

if [[ -n $dry ]]; then
  echo "$text"
  echo "# kubectl apply --dry-run=server -f - && kubectl apply -f -"
  exit 0
fi
command -v kubectl >/dev/null || fail "kubectl is not installed: gcloud components install kubectl gke-gcloud-auth-plugin"
kubectl get crd jobsets.jobset.x-k8s.io >/dev/null ||
  fail "the cluster does not answer, or JobSet is not installed in it (jobset.sigs.k8s.io/docs/installation)"
fitting="cloud.google.com/gke-tpu-accelerator=${value[ACCELERATOR]},cloud.google.com/gke-tpu-topology=${value[TOPOLOGY]}"
pools=$(kubectl get nodes -l "$fitting" -o jsonpath='{range .items[*]}{.metadata.labels.cloud\.google\.com/gke-nodepool}{"\n"}{end}' |
  sort -u | grep -c .) || true
((pools >= value[SLICES])) || echo "launch/gke_jobset.sh: ${pools:-0} of ${value[SLICES]} node pools of ${value[ACCELERATOR]} ${value[TOPOLOGY]}" \
  "have nodes; the JobSet waits for the others (an autoscaled pool makes them)" >&2
kubectl apply --dry-run=server -f - >/dev/null <<<"$text" ||
  fail "the cluster does not take this JobSet (above); one that ran before goes with: kubectl delete jobset ${value[NAME]}"
kubectl apply -f - <<<"$text"
