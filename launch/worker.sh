#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What tpu_pod.sh does on each host of a TPU pod, in the clone that it has
# brought there. Arguments are one of
#
#   install         Python 3.12 if there is neither that nor 3.11, and .venv
#   mount BUCKET    gs://BUCKET at /tmp/gcs/BUCKET
#   start VERB ...  the run, which outlives the connection that started it
#   status          prints running, exit CODE, lost (the host restarted) or none
#   follow          prints the log until the run ends
#   stop            SIGTERM to the run, which saves and ends
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=launch/common.sh
source launch/common.sh

run=$HOME/l2s_jax_run  # log, process id and exit code

install() {
  # Hosts come with Ubuntu 22.04's 3.10; uv needs no root.
  if ! find_python &> /dev/null; then
    python3 -m pip install -qq --user uv
    python3 -m uv python install -q 3.12
    PYTHON=$(python3 -m uv python find 3.12)
  fi
  prepare requirements-tpu.txt
}

# Without caches of what is there: hosts see each other's files.
mount_bucket() {
  local bucket=$1 at=/tmp/gcs/$1 key=/usr/share/keyrings/cloud.google.asc
  if ! command -v gcsfuse > /dev/null; then
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg \
      | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt" \
      "gcsfuse-$(lsb_release -cs) main" \
      | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    # A new host may be updating itself.
    sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
    sudo apt-get -o DPkg::Lock::Timeout=600 install -qq -y gcsfuse
  fi
  mkdir -p "$at"
  mountpoint -q "$at" || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" "$at"
}

is_running() {
  # The number alone may be another process's, after a restart of the host.
  [[ -f $run/pid ]] && grep -qs worker.sh "/proc/$(< "$run/pid")/cmdline"
}

status() {
  if [[ -f $run/code ]]; then
    echo "l2s_jax: exit $(< "$run/code")"
  elif is_running; then
    echo 'l2s_jax: running'
  elif [[ -f $run/pid ]]; then
    echo 'l2s_jax: lost'
  else
    echo 'l2s_jax: none'
  fi
}

start() {
  if is_running; then
    echo 'launch: a run is on already' >&2
    return 1
  fi
  mkdir -p "$run"
  rm -f "$run/code"
  setsid launch/worker.sh execute "$@" >> "$run/log" 2>&1 < /dev/null &
  echo $! > "$run/pid"
}

# The body of `start`.
execute() {
  local code=0
  # shellcheck source=launch/env.sh
  source launch/env.sh tpu
  # That hosts belong together stands in their metadata, which JAX reads.
  export L2S_DISTRIBUTED=auto
  trap : TERM  # The verb gets it as well, and ends by itself.
  "${L2S_PYTHON:-.venv/bin/python}" -u -m l2s_jax "$@" || code=$?
  echo "$code" > "$run/code"
}

follow() {
  # On the way out, tail gives what was written last.
  tail -n 100 -F --pid="$(< "$run/pid")" "$run/log" 2> /dev/null || true
}

stop() {
  is_running && kill -TERM -- "-$(< "$run/pid")"
}

case ${1-} in
  install | start | execute | status | follow | stop) "$@" ;;
  mount) mount_bucket "$2" ;;
  *) usage launch/worker.sh ;;
esac
