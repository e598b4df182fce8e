# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated text for any script: BLEU, chrF, ROUGE and others.

`scores` configures the metrics of a task; `metric_fns` provides them as SeqIO
`metric_fn`s. Nothing here depends on tasks or models.
"""

# The modules that other packages may import.
__all__ = ('bleu', 'length_bins', 'metric_fns', 'scores')
