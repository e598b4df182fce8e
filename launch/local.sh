#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a verb in several processes on this machine, joined over loopback with
# Gloo on CPU: what a pod does, without one.
#
#   ./launch/local.sh --processes=2 -- train --gin_file=...
#
#   --processes=N            how many (2)
#   --devices_per_process=M  virtual CPU devices of each (1)
#   --restart                start again for as long as they end with code 75
#   --end_secs=S             how long the others have, once one has failed, to
#                            end by themselves before they are killed (90: a
#                            dead process is noticed after 60)
#
# Each line of output begins with its process: [0]. Ctrl-C and SIGTERM become
# SIGTERM to all, who save and end; the second time they are killed. The exit
# code is that of the first that failed, or 75, or 0. L2S_PYTHON names a Python
# that has the requirements; without it, .venv is made.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/common.sh
source launch/common.sh

processes=2 devices=1 end_secs=90 restart=''
while (($# > 0)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices_per_process=*) devices=${1#*=} ;;
    --end_secs=*) end_secs=${1#*=} ;;
    --restart) restart=yes ;;
    --) shift && break ;;
    *) usage launch/local.sh ;;
  esac
  shift
done
if (($# == 0)) || [[ ! "$processes $devices $end_secs" =~ \
  ^[1-9][0-9]*\ [1-9][0-9]*\ [0-9]+$ ]]; then
  usage launch/local.sh
fi
if [[ -z ${L2S_PYTHON-} ]]; then
  prepare requirements.txt
  L2S_PYTHON=.venv/bin/python
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=$devices
export JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
if ((devices > 1)); then
  # A device that waits for others keeps a thread of XLA's; with one for each,
  # a busy machine can leave all of them waiting.
  export PJRT_NPROC=${PJRT_NPROC:-$((4 * devices))}
fi
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-5}  # seconds between them

pids=()
scratch=$(mktemp -d)
# Every process gets a group of its own, so that Ctrl-C reaches this script
# alone, and a killed process takes its children along.
set -m

kill_all() {
  local pid
  for pid in "${pids[@]}"; do
    kill -KILL -- "-$pid" 2> /dev/null || true
  done
}

stop() {
  if [[ -n ${STOPPING-} ]]; then
    kill_all
  elif ((${#pids[@]} > 0)); then
    kill -TERM "${pids[@]}" 2> /dev/null || true
  fi
  STOPPING=yes
}

trap stop INT TERM
trap 'kill_all; rm -rf "$scratch"' EXIT

# Starts process INDEX of those that meet at a port of loopback.
start() {
  local index=$1 port=$2
  shift 2
  rm -f "$scratch/$index" && mkfifo "$scratch/$index"
  # A progress bar's states are lines, too.
  stdbuf -oL tr -s '\r' '\n' < "$scratch/$index" | sed -u "s/^/[$index] /" &
  printers+=("$!")
  L2S_COORDINATOR_ADDRESS=127.0.0.1:$port L2S_NUM_PROCESSES=$processes \
    L2S_PROCESS_ID=$index "$L2S_PYTHON" -u -m l2s_jax "$@" \
    > "$scratch/$index" 2>&1 < /dev/null &
  pids[index]=$!
}

# Starts all, waits for them, and returns the exit code of the whole.
run_all() {
  local index port code deadline='' codes=() printers=()
  port=$("$L2S_PYTHON" -c 'import socket
with socket.create_server(("127.0.0.1", 0)) as server:
  print(server.getsockname()[1])') || return
  for ((index = 0; index < processes; index++)); do
    start "$index" "$port" "$@"
  done
  while ((${#pids[@]} > 0)); do
    for index in "${!pids[@]}"; do
      if kill -0 "${pids[index]}" 2> /dev/null; then
        continue
      fi
      code=0
      wait "${pids[index]}" || code=$?
      kill -KILL -- "-${pids[index]}" 2> /dev/null || true  # its children
      unset "pids[index]"
      codes+=("$code")
      if ((code != 0)); then
        echo "launch: process $index has ended with exit code $code" >&2
        deadline=${deadline:-$((SECONDS + end_secs))}
      fi
    done
    if [[ -n $deadline ]] && ((${#pids[@]} > 0 && SECONDS >= deadline)); then
      echo "launch: killing processes ${!pids[*]}, which have not ended" \
        "$end_secs seconds after the first" >&2
      kill_all
      pids=()  # What they end with is our doing.
    fi
    sleep 0.1
  done
  wait "${printers[@]}" || true
  return "$(verdict "${codes[@]}")"
}

if [[ -n $restart ]]; then
  until_done run_all "$@"
else
  run_all "$@"
fi
