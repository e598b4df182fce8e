#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a verb on all hosts of a TPU pod; gcloud must be installed, logged in.
#
#   ./launch/tpu_pod.sh --name=pod --zone=us-west4-a --type=v5litepod-256 \
#     --runtime=v2-alpha-tpuv5-lite --spot -- \
#     train --gin_file=... --gin.MODEL_DIR=gs://mine/runs/first
#
# Makes the pod by a queued resource unless it is there, brings this clone to
# its hosts (files that git tracks or would), installs, runs, and shows the log
# of the first host. After exit code 75 the run is started again, after a
# preemption the pod is made again first; 0 and any other code end the script
# with that code. The run outlives this script: the same command finds it again.
#
#   --name=NAME --zone=ZONE [--project=PROJECT]
#   --type=TYPE --runtime=VERSION  what to make; without --type the pod NAME is
#                     there, and not a queued resource
#   --slices=N        so many pods of this type as one (1)
#   --spot            capacity that can be preempted
#   --create_flag=F   a further flag of `gcloud compute tpus queued-resources
#                     create`, such as --reserved; may be repeated
#   --bucket=BUCKET   mounts gs://BUCKET at /tmp/gcs/BUCKET of every host by
#                     gcsfuse; paths of gs:// need no mount
#   --delete          delete the pod once the run has finished (exit code 0)
#   --dry_run         print every command, and run none
#
# In place of `-- VERB ...`: stop (SIGTERM: the run saves and ends), status,
# delete (the pod).
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/common.sh
source launch/common.sh

name='' zone='' project='' type='' runtime='' slices=1 bucket='' action=run
delete_after='' dry_run='' create_flags=()
while (($# > 0)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) create_flags+=(--spot) ;;
    --create_flag=*) create_flags+=("${1#*=}") ;;
    --bucket=*) bucket=${1#*=} ;;
    --delete) delete_after=yes ;;
    --dry_run) dry_run=yes ;;
    stop | status | delete) action=$1 ;;
    --) shift && break ;;
    *) usage launch/tpu_pod.sh ;;
  esac
  shift
done
if [[ -z $name || -z $zone || ! $slices =~ ^[1-9][0-9]*$ ]] \
  || [[ -n $type && -z $runtime ]] || [[ $action == run && $# == 0 ]]; then
  usage launch/tpu_pod.sh
fi

poll_secs=${L2S_POLL_SECS:-30}
where=(--zone="$zone" --quiet)
[[ -z $project ]] || where+=(--project="$project")
gcloud_tpus=(gcloud compute tpus)
remote='cd l2s_jax && ./launch/worker.sh'
# What an earlier copy has brought goes; .venv, runs and the like stay.
remove_old='{ [ ! -f ../l2s_jax.files ] || xargs -r -d "\n" rm -f < ../l2s_jax.files; }'
scratch=$(mktemp -d)
archive=$scratch/l2s_jax.tar.gz
trap 'rm -rf "$scratch"' EXIT

# Runs a command and says so; of a dry run only the second is true.
run() {
  local word line='+'
  for word in "$@"; do
    [[ $word =~ ^[-A-Za-z0-9_./:=,]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "$line" >&3
  [[ -n $dry_run ]] || "$@"
}
exec 3>&2
[[ -z $dry_run ]] || exec 3>&1

# --- the pod ---

# Prints ACTIVE, ABSENT, or what else Google calls the state of the pod.
pod_state() {
  local kind=queued-resources field=state.state state
  [[ -n $type ]] || kind=tpu-vm field=state
  if state=$(run "${gcloud_tpus[@]}" "$kind" describe "$name" "${where[@]}" \
    --format="value($field)" 2> "$scratch/errors"); then
    echo "${state/#READY/ACTIVE}"
  elif grep -q NOT_FOUND "$scratch/errors"; then
    echo ABSENT
  else
    cat "$scratch/errors" >&2
    return 1
  fi
}

create_pod() {
  local nodes=(--node-id="$name")
  if ((slices > 1)); then
    nodes=(--node-count="$slices" --node-prefix="$name")
  fi
  run "${gcloud_tpus[@]}" queued-resources create "$name" "${where[@]}" \
    "${nodes[@]}" --accelerator-type="$type" --runtime-version="$runtime" \
    "${create_flags[@]}"
}

delete_pod() {
  if [[ -n $type ]]; then
    run "${gcloud_tpus[@]}" queued-resources delete "$name" "${where[@]}" \
      --force
  else
    run "${gcloud_tpus[@]}" tpu-vm delete "$name" "${where[@]}"
  fi
}

# Returns once the pod is active, made if it is not there. Capacity is waited
# for by the hour: that Google does not answer ends it the 20th time in a row.
ensure_pod() {
  local state made='' failures=0
  while true; do
    if ! state=$(pod_state); then
      ((++failures < 20)) || return 1
      sleep "$poll_secs"
      continue
    fi
    failures=0
    case $state in
      ACTIVE) return ;;
      CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | \
        SUSPENDING | DELETING | STARTING | STOPPING | RESTARTING | \
        REIMAGING | REPAIRING)
        echo "launch: $name is $state" >&2
        sleep "$poll_secs"
        ;;
      SUSPENDED | FAILED | ABSENT)
        if [[ -z $type ]]; then
          echo "launch: $name is $state; --type and --runtime make it" >&2
          return 1
        elif [[ $state == ABSENT ]]; then
          create_pod || return
          made=yes
        elif [[ -z $made ]]; then
          delete_pod || return
        else
          echo "launch: $name was made and is $state" >&2
          return 1
        fi
        ;;
      *)
        echo "launch: $name is $state, and nothing is done about that" >&2
        return 1
        ;;
    esac
  done
}

# --- its hosts ---

# Runs a command on worker `0` (of the first slice) or on `all`.
on_workers() {
  if [[ -n $type ]]; then
    run "${gcloud_tpus[@]}" queued-resources ssh "$name" "${where[@]}" \
      --node="$1" --worker="$1" --command="$2"
  else
    run "${gcloud_tpus[@]}" tpu-vm ssh "$name" "${where[@]}" \
      --worker="$1" --command="$2"
  fi
}

copy_clone() {
  local to=(queued-resources scp "$archive" "$name:l2s_jax.tar.gz" --node=all)
  [[ -n $type ]] || to=(tpu-vm scp "$archive" "$name:l2s_jax.tar.gz")
  run bash -o pipefail -c \
    "git ls-files -z --cached --others --exclude-standard \
| tar --null --ignore-failed-read -czf $archive -T -" \
    && run "${gcloud_tpus[@]}" "${to[@]}" --worker=all "${where[@]}" \
    && on_workers all "mkdir -p l2s_jax && cd l2s_jax && $remove_old \
&& tar -xzvf ../l2s_jax.tar.gz > ../l2s_jax.files"
}

start() {
  copy_clone && on_workers all "$remote install" || return
  [[ -z $bucket ]] || on_workers all "$remote mount ${bucket@Q}" || return
  on_workers all "$remote start ${*@Q}"
}

# Prints a line for each host, such as `l2s_jax: exit 75`.
statuses() {
  on_workers all "$remote status 2> /dev/null || echo 'l2s_jax: none'" \
    | { grep '^l2s_jax: ' || [[ -n $dry_run ]]; }
}

# --- the run ---

# Returns CODE if the pod is well, 75 if it has gone. One that was preempted
# counts as active for a while, and its hosts do not answer.
unless_gone() {
  local code=$1 attempts state
  for ((attempts = 0; attempts < 20; attempts++)); do
    if state=$(pod_state) && [[ $state != ACTIVE ]]; then
      echo "launch: $name is $state" >&2
      return "$AGAIN"
    elif on_workers all true > /dev/null 2>&1; then
      break
    fi
    sleep "$poll_secs"
  done
  return "$code"
}

# Shows the log until the run has ended everywhere, and returns its exit code.
follow() {
  local states codes ended_secs=''
  while true; do
    # Ends with the run, or when the connection breaks.
    on_workers 0 "$remote follow" || true
    if ! states=$(statuses); then
      unless_gone 0 || return
    elif [[ $states != *running* ]]; then
      break
    elif [[ $states == *exit* || $states == *lost* ]]; then
      ended_secs=${ended_secs:-$SECONDS}
      if ((SECONDS - ended_secs > 300)); then
        echo 'launch: some hosts have ended, and others do not; stopping' >&2
        on_workers all "$remote stop || true" || true
      fi
    fi
    sleep "$poll_secs"
  done
  # A host that has restarted, or is a new one, was preempted, whatever the
  # others made of it.
  [[ $states != *lost* && $states != *none* ]] || return "$AGAIN"
  mapfile -t codes < <(sed -n 's/^l2s_jax: exit //p' <<< "$states")
  unless_gone "$(verdict "${codes[@]}")"
}

# Brings the run to an end on the pod as it is now, and returns its exit code.
attempt() {
  local states
  ensure_pod || return 1
  states=$(statuses) || states=''
  if [[ $states == *running* ]]; then
    echo 'launch: the run is on already' >&2
  else
    start "$@" || unless_gone 1 || return
  fi
  follow
}

# Prints what `attempt` and what follows it would do.
plan() {
  echo '# The pod, unless it is active already:'
  pod_state > /dev/null
  [[ -z $type ]] || create_pod
  echo '# The run, unless it is on already:'
  statuses
  start "$@"
  echo '# Until it has ended on all hosts:'
  on_workers 0 "$remote follow"
  statuses
  echo '# Exit code 75: again from "The run". Pod gone: from the top, after'
  [[ -z $type ]] || delete_pod
  if [[ -n $delete_after ]]; then
    echo '# Exit code 0:'
    delete_pod
  fi
}

case $action in
  delete) delete_pod ;;
  stop) on_workers all "$remote stop" ;;
  status) pod_state && statuses ;;
  run)
    if [[ -n $dry_run ]]; then
      plan "$@"
    else
      until_done attempt "$@"
      [[ -z $delete_after ]] || delete_pod
    fi
    ;;
esac
