# SPDX-License-Identifier: Apache-2.0
"""Training: train state, train step, optimizers, checkpoints.

`train` is the verb: mesh, data, state, step, hooks, loop. `train_data` has the
settings of batches, `resuming` starts or resumes a run, and `programs` compiles
the train steps. `hooks` run between steps: logs, checkpoints, evaluations,
`trackers` and a user's own. `eval_plan` lists the evaluations. `distillation`
adds a teacher's loss to a step, and `teachers` loads the teacher. Evaluation
itself is in `evaluation/`.
"""

# Modules that other packages may import.
__all__ = (
  'adafactor',
  'checkpoint',
  'hooks',
  'optim',
  'progress',
  'resuming',
  'state',
  'train',
  'train_step',
)
