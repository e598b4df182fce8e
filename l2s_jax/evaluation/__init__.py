# SPDX-License-Identifier: Apache-2.0
"""Evaluation of checkpoints: metrics, loss, controls and reports.

`scoring.Evaluator` evaluates parameters with SeqIO's Evaluator, during and
after training. `controls` replaces the LLM's states for control experiments.
The verb `evaluate` evaluates checkpoints; the verb `report` (`report_command`)
compares runs. `report` makes tables and plots for both; `metric_writer` writes
metric logs.
"""

# The modules that other packages may import.
__all__ = (
  'evaluate',
  'scoring',
  'metric_writer',
  'report',
  'report_command',
  'run_records',
  'seqio_evaluator',
)
