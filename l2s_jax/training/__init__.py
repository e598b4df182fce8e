# SPDX-License-Identifier: Apache-2.0
"""Training: the state, its step, its optimizer, its checkpoints.

`train` is the verb: mesh, data, state, step, hooks, loop. `train_data` says how
batches are made, `resuming` begins a run or goes on with one, `programs`
compiles its steps, and `hooks` are what happens beside these (logs,
checkpoints, evaluations, a user's own). `distillation` is what a step learns of
a teacher, whom `teachers` finds. What is evaluated, and how, is in
`evaluation/`.
"""

# The modules that other packages may import.
__all__ = (
  'adafactor',
  'checkpoint',
  'hooks',
  'optim',
  'progress',
  'state',
  'train',
  'train_step',
)
