# SPDX-License-Identifier: Apache-2.0
"""Scores, loss and controls of the steps of a run.

`scoring.Evaluator` evaluates parameters with SeqIO's Evaluator, in training
and afterwards, `controls` makes what the SLM gets in the place of the LLM's
states; `evaluate` is the verb. The verb `report` (`report_command`) sets runs
side by side. `report` has the tables and plots of both, `metric_writer` the
logs.
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
