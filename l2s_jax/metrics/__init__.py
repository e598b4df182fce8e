# SPDX-License-Identifier: Apache-2.0
"""Scores of written answers, for any script: BLEU, chrF, ROUGE and others.

`scores` says which of them a task has; `metric_fns` has them in the form that
SeqIO calls. No tasks and no models are here.
"""

# The modules that other packages may import.
__all__ = ('bleu', 'length_bins', 'metric_fns', 'scores')
