#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains, evaluates and uses a small LLM-to-SLM model, from a fresh clone with
# Python 3.11 or 3.12. Arguments go to `python -m l2s_jax.quickstart`; --help
# lists them, --slm=own_vocabulary takes an SLM with a vocabulary of its own.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

prepare requirements.txt
exec .venv/bin/python -m l2s_jax.quickstart "$@"
