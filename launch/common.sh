# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the launchers: what the exit codes of a run mean. 0: it has
# finished. 75: it was stopped, has saved, and goes on when it is started again.
# Anything else is an error, which starting again would repeat.

readonly AGAIN=75

# Prints a script's opening comment, and returns the exit code of wrong usage.
usage() {
  sed -n '3,/^[^#]/s/^# \{0,1\}//p' "$1" >&2
  return 2
}

# Prints the exit code of a whole from those of its processes, in the order in
# which they ended: that of the first error, else 75 if one has it, else 0.
verdict() {
  local code whole=0
  for code in "$@"; do
    if ((code == AGAIN)); then
      whole=$AGAIN
    elif ((code != 0)); then
      echo "$code"
      return
    fi
  done
  echo "$whole"
}

# Runs a command until it ends with another code than 75, and returns that code.
# With STOPPING set, 75 too: whoever has stopped us will start us again.
until_done() {
  local code
  while true; do
    code=0
    "$@" || code=$?
    ((code == AGAIN)) || return "$code"
    if [[ -z ${STOPPING-} ]]; then
      echo "launch: exit code $AGAIN, starting again" >&2
      sleep "${RESTART_SECS:-5}"
    fi
    [[ -z ${STOPPING-} ]] || return "$AGAIN"
  done
}
