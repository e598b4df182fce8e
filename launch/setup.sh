# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts beside it: goes to the root of the clone and offers
# `prepare FILE`, which makes .venv and installs a requirements file into it.
# PYTHON names the interpreter to make .venv from, if not the first one found.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# Run, not only found: a version manager may leave a python3.12 that fails.
is_python() {
  "$1" -c 'import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
    if is_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  cat >&2 << 'MESSAGE'
No Python 3.11 or 3.12 with venv and pip was found. Install one (Debian and
Ubuntu: `apt install python3.12 python3.12-venv`), or name one:
PYTHON=/path/to/python3.12.
MESSAGE
  return 1
}

prepare() {
  local requirements=$1 python stamp=.venv/$1.installed
  if [[ -x .venv/bin/python ]] && ! is_python .venv/bin/python; then
    echo "$PWD/.venv has $(.venv/bin/python --version), which is neither" \
      "3.11 nor 3.12. Move it away and start again." >&2
    return 1
  fi
  # A .venv without pip was broken off in the making.
  if ! .venv/bin/python -c 'import pip' 2> /dev/null; then
    python=$(find_python)
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  # The stamp is the text that was installed; requirements-dev.txt includes
  # requirements.txt.
  if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "Installing $requirements into .venv (a minute or two)"
    .venv/bin/python -m pip install -qq --disable-pip-version-check \
      --prefer-binary -r "$requirements"
    cat requirements*.txt > "$stamp"
  fi
}
