# SPDX-License-Identifier: Apache-2.0
"""Scores, loss and controls of the steps of a run.

`scoring.Evaluator` evaluates parameters with SeqIO's Evaluator, in training
and afterwards; `evaluate` is the verb; `report` writes tables and plots,
`metric_writer` the logs.
"""

# The modules that other packages may import.
__all__ = (
  'evaluate',
  'scoring',
  'metric_writer',
  'report',
  'seqio_evaluator',
)
