# SPDX-License-Identifier: Apache-2.0
"""Training of LLM-to-SLM or of a single language model, on any mesh.

The order is: mesh, system, shardings, state, data, step, loop. Only trainable
parameters get gradients. The frozen LLM is an argument of the train step and
not a result.
"""

import contextlib
import itertools
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import jax
import optax

from l2s_jax.data import batching, bound_tasks
from l2s_jax.runtime import (
  distributed,
  partitioning,
  preemption,
)
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.training import (
  checkpoint,
  eval_plan,
  optim,
  programs,
  resuming,
  train_data,
  train_step,
)
from l2s_jax.training import distillation as distillation_lib
from l2s_jax.training import hooks as hooks_lib
from l2s_jax.training import progress as progress_lib


@gin.configurable(module='l2s_jax')
def train(
  model: system_lib.System = gin.REQUIRED,
  mixture_or_task_name: str = gin.REQUIRED,
  task_feature_lengths: Mapping[str, int] = gin.REQUIRED,
  train_steps: int = gin.REQUIRED,
  model_dir: str = gin.REQUIRED,
  batch_size: int = gin.REQUIRED,
  optimizer: optim.Optimizer = gin.REQUIRED,
  mesh: partitioning.MeshConfig | None = None,
  num_microbatches: int = 1,
  pack: bool = False,
  length_buckets: batching.LengthBuckets = (),
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  distillation: distillation_lib.Distillation | None = None,
  eval_period: int | None = None,
  eval_split: str | None = 'validation',
  num_eval_examples: int | None = None,
  eval_batch_size: int | None = None,
  checkpoint_period: int = 1000,
  keep_checkpoints: int | None = 3,
  best_metric: str | None = None,
  log_period: int = 50,
  seed: int = 0,
  preemption_grace_secs: int = 60,
  profile_steps: Sequence[int] | None = None,
  evaluations: Sequence[eval_plan.Evaluation] = (),
  hooks: Sequence[Any] = (),
  trackers: Sequence[str] = ('tensorboard',),
  skip_spikes: int | float | None = None,
  *,
  dry_run: bool = False,
) -> dict[str, float]:
  """Trains a system with evaluations; resumes an existing run.

  A checkpoint is saved every `checkpoint_period` steps, before every evaluation
  and at the end. It is also saved at SIGTERM and Ctrl-C, which end the process
  with exit code 75 and 130; the same command resumes the run.

  Args:
    model: the system: LLM-to-SLM or a single language model.
    mixture_or_task_name: SeqIO task or mixture to train on.
    task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer).
    train_steps: total number of updates, those of earlier starts included; 0
      saves and evaluates the initial model.
    model_dir: the run's folder. Training resumes from its newest checkpoint.
    batch_size: rows per step, over all devices.
    optimizer: with its schedule.
    mesh: device mesh and axis rules; None puts all devices along `data`.
    num_microbatches: sequential parts of a batch, to save memory.
    pack: whether to pack several examples into a row; for encoder-decoders.
    length_buckets: shorter batch lengths, as in `batching.bucket_lengths`. A
      train step is compiled for each.
    label_smoothing: probability mass moved from the target to all other tokens.
    z_loss: weight of the squared log of the softmax's denominator.
    distillation: a teacher's loss beside that of the gold answers.
    eval_period: steps between evaluations; None evaluates at the end.
    eval_split: split to evaluate on; None evaluates only `evaluations`.
    num_eval_examples: number of examples, from the start of the split; None
      means all.
    eval_batch_size: examples per decoding batch; None means `batch_size`.
    checkpoint_period: steps between checkpoints.
    keep_checkpoints: number of newest checkpoints to keep; None keeps all.
    best_metric: metric whose best checkpoint is also kept, such as 'bleu' or
      'loss'; None keeps no best one.
    log_period: steps between log lines.
    seed: of initialisation, data order and dropout.
    preemption_grace_secs: time from SIGTERM to the end of the process.
    profile_steps: first and last step to trace into `profile/`, for
      TensorBoard's profiler.
    evaluations: evaluations on further tasks or splits. If there are any, the
      evaluation of the settings above runs only if it is listed. Scores are
      then logged, and named in `best_metric`, as 'TASK-SPLIT/SCORE'.
    hooks: further hooks to call between steps; see `hooks.Hook`.
    trackers: destinations of the numbers beside `metrics.jsonl`: any of
      'tensorboard', 'wandb' and 'trackio'; see `training/trackers.py`.
    skip_spikes: largest accepted ratio of the norm of a step's gradients to the
      mean of earlier norms, such as 10; see `optim.skip_spikes`. None accepts
      all.
    dry_run: print sizes and shardings, then stop.

  Returns:
    The scores of the last evaluation, by metric name.

  Raises:
    ValueError: for incompatible settings, before compilation.
    FloatingPointError: if a loss is not finite.
    SystemExit: after SIGTERM or SIGINT.
  """
  settings = resuming.RunSettings(
    run_dir=checkpoint.check_folder(model_dir),
    train_steps=train_steps,
    log_period=log_period,
    checkpoint_period=checkpoint_period,
    keep_checkpoints=keep_checkpoints,
    preemption_grace_secs=preemption_grace_secs,
    profile_steps=profile_steps,
    hooks=hooks,
    trackers=trackers,
  )
  optimizer = optim.skip_spikes(optimizer, skip_spikes)
  data = train_data.TrainData(
    task_feature_lengths, batch_size, seed, pack, length_buckets
  )
  data.check_model(model.module)
  step = train_step.StepSettings(num_microbatches, label_smoothing, z_loss)
  plan = eval_plan.make(
    evaluations,
    eval_plan.Planned(
      mixture_or_task_name,
      eval_split or '',
      num_eval_examples,
      eval_period,
      task_feature_lengths,
    ),
    best_metric,
    eval_batch_size,
  )
  session = session_lib.start(
    lambda: _pin(model, settings.run_dir, mixture_or_task_name),
    mesh,
    plan.longest(task_feature_lengths),
    batch_sizes={'BATCH_SIZE': batch_size, 'eval_batch_size': eval_batch_size},
    num_microbatches=num_microbatches,
  )
  task = session_lib.bind_task(session.system, mixture_or_task_name)
  lesson = distillation.bind(session, data) if distillation else None
  steps = programs.Steps(
    step, optimizer, _transform(optimizer, session), lesson
  )
  if dry_run:  # No data needed.
    print(steps.describe(session))
    return {}
  task.check_data('train', task_feature_lengths)
  eval_tasks = plan.bind(session.system, task, mixture_or_task_name)
  kind = data.run_kind(mixture_or_task_name, task, optimizer)
  with session.entered(), contextlib.ExitStack() as opened:
    loop = resuming.begin(
      opened, session, steps.transform, settings, kind, steps.teacher
    )
    batches = data.batches(task, loop, session.mesh)
    opened.callback(batches.close)
    evaluates = plan.hooks(loop, session, eval_tasks, batch_size)
    parts = _parts(batches, loop)
    compiled = steps.compile(loop, session.mesh, data.batch_shapes())
    hooked = settings.all_hooks(optimizer.schedule, compiled.secs, evaluates)
    _run(loop, parts, compiled, session.mesh, hooked)
    data.say_what_was_cut(batches, loop)
    return eval_plan.last_scores(evaluates)


def _pin(
  model: system_lib.System, run_dir: pathlib.Path, task: str
) -> system_lib.System:
  """Returns the system with the run's own LLM, or with its cached states."""
  return session_lib.with_cached_states(
    run_folder.pin_llm(model, run_dir), task
  )


def _transform(
  optimizer: optim.Optimizer, session: session_lib.Session
) -> optax.GradientTransformation:
  """Returns the optimizer's transformation of the trained parameters."""
  transform = optimizer.make(
    parameters.split(session.layout.axes, session.system.frozen)[1]
  )
  if session.system.has_lora:
    return optim.without(transform, session.system.is_trained)
  return transform


def _run(
  loop: hooks_lib.Loop,
  parts: Iterator[batching.Part],
  compiled: programs.Compiled,
  mesh: jax.sharding.Mesh,
  hooked: hooks_lib.Hooked,
) -> None:
  """Runs the remaining steps, and calls the hooks that are due after each.

  Args:
    loop: the run.
    parts: batches from the run's position on; one host's rows of each.
    compiled: the train steps.
    mesh: the device mesh.
    hooked: the hooks.

  Raises:
    FloatingPointError: if a loss is not finite.
    SystemExit: after SIGTERM or SIGINT; the last step is saved.
  """
  hooks = [*hooked.in_step, *hooked.ours, *hooked.users]
  loop.watcher.save = loop.save_and_wait
  with contextlib.ExitStack() as opened:
    for hook in hooks:
      opened.callback(hook.close)
    try:
      if loop.step or not loop.train_steps:
        # The process may have been killed before an evaluation.
        hooks_lib.call(hooked.ours, loop)
        if loop.metrics:
          hooks_lib.call(hooked.users, loop)
      while loop.step < loop.train_steps:
        loop.watcher.check()
        with loop.progress.waiting_for_data():
          part = next(parts)
        for hook in hooks:
          hook.before(loop)
        batch = partitioning.put_batch(
          part.batch, mesh, part.rows, part.num_rows
        )
        step_fn = compiled.step_fn(loop.step, batching.lengths(part.batch))
        with loop.watcher.lock:
          loop.state, sums = step_fn(
            loop.state, loop.frozen, batch, loop.teacher
          )
          loop.step += 1
          loop.num_rows += part.num_rows
          loop.position = part.position
          loop.metrics = {}
          loop.progress.add(loop.step, sums, part)
          hooks_lib.call(hooked.in_step, loop)
        loop.bar.update()
        hooks_lib.call([*hooked.ours, *hooked.users], loop)
    except preemption.Preempted:
      loop.watcher.leave()
      loop.save_and_wait()
      loop.say(f'Saved step {loop.step}. Start again to resume from it.')
      raise SystemExit(loop.watcher.exit_code) from None


def _parts(
  batches: bound_tasks.TrainBatches, loop: hooks_lib.Loop
) -> Iterator[batching.Part]:
  """Returns this host's parts of the batches for the remaining steps.

  It waits for the first one, and reports the time of skipping earlier rows.

  Raises:
    ValueError: if the task has no examples.
  """
  if loop.step >= loop.train_steps:
    if loop.step:
      loop.say(
        f'The run is at step {loop.step}: TRAIN_STEPS={loop.train_steps} '
        'leaves nothing to train.'
      )
    return iter(())
  parts = batches.parts()
  start_secs = time.perf_counter()
  with progress_lib.reminding():
    first = next(parts, None)
    distributed.wait_for_all('the first batch')
  if first is None:
    raise ValueError(
      f"task {loop.kind['task']!r} has no examples in split 'train'. "
      'Give it files with lines.'
    )
  if loop.step:
    loop.say(
      f'Resuming from step {loop.step}; skipped {loop.num_rows:,} rows in '
      f'{time.perf_counter() - start_secs:.1f} s.'
    )
  return itertools.chain([first], parts)
