# SPDX-License-Identifier: Apache-2.0
"""Training: the state, its step, its optimizer, its checkpoints.

`train` is the verb. What is evaluated, and how, is in `evaluation/`.
"""

# The modules that other packages may import.
__all__ = ('checkpoint', 'optim', 'progress', 'state', 'train')
