# SPDX-License-Identifier: Apache-2.0
"""Imports tensorboardX as runs do, for the server of `forked.py`."""

from l2s_jax.evaluation import metric_writer

metric_writer._event_file_writer()
