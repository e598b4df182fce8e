# SPDX-License-Identifier: Apache-2.0
"""Training: LLM-to-SLM, or a language model alone, on any mesh.

Mesh, system, shardings, state, data, step, loop, in this order. Gradients are
taken of the trainable parameters alone; the frozen LLM goes in as an argument
and never comes out.
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
  files,
  partitioning,
  preemption,
)
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.training import distillation as distillation_lib
from l2s_jax.training import (
  eval_plan,
  optim,
  programs,
  resuming,
  train_data,
  train_step,
)
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
  *,
  dry_run: bool = False,
) -> dict[str, float]:
  """Trains a system and evaluates it as it goes; resumes by itself.

  A checkpoint is saved every `checkpoint_period` steps, before every
  evaluation, at the end, and at SIGTERM, which ends the process with exit code
  75, or Ctrl-C, with 130: start it again to go on.

  Args:
    model: the system: LLM-to-SLM or a language model alone.
    mixture_or_task_name: SeqIO task or mixture to train on.
    task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer).
    train_steps: updates in all, those of earlier starts included; 0 saves and
      evaluates the model as it came.
    model_dir: the run's folder. Training goes on from its newest checkpoint.
    batch_size: rows a step, over all devices.
    optimizer: with its schedule.
    mesh: device mesh and axis rules; None puts all devices along `data`.
    num_microbatches: parts a batch is computed in, one after another.
    pack: whether a row holds as many examples as fit; for encoder-decoders.
    length_buckets: shorter lengths that a batch may have, as
      `batching.bucket_lengths` takes them. A step is compiled for each.
    label_smoothing: probability given to all tokens in equal parts.
    z_loss: weight of the squared log of the softmax's denominator.
    distillation: from whom the model learns beside the gold answers.
    eval_period: steps between evaluations; None evaluates at the end.
    eval_split: of the task; None evaluates nothing but `evaluations`.
    num_eval_examples: the first so many of the split; None takes all.
    eval_batch_size: examples a decoding batch; None takes `batch_size`.
    checkpoint_period: steps between saves.
    keep_checkpoints: the newest so many are kept; None keeps all.
    best_metric: the best checkpoint by it is kept as well, such as 'bleu' or
      'loss'; None keeps none.
    log_period: steps between lines in the log.
    seed: of initialisation, data order and dropout.
    preemption_grace_secs: between SIGTERM and the end of the process.
    profile_steps: the first and the last step to trace into `profile/`, for
      TensorBoard's profiler.
    evaluations: of other tasks or splits as well; where there are any, the one
      that the settings above describe is made only if it is listed. Scores are
      then logged, and named by `best_metric`, as 'TASK-SPLIT/SCORE'.
    hooks: what else to do every so many steps; see `hooks.Hook`.
    trackers: of the numbers beside `metrics.jsonl`: any of 'tensorboard',
      'wandb' and 'trackio'; see `training/trackers.py`.
    dry_run: prints sizes and shardings, and stops.

  Returns:
    The last evaluation, by metric name.

  Raises:
    ValueError: for settings that do not fit each other, before compilation.
    FloatingPointError: if a loss is not finite.
    SystemExit: after SIGTERM or SIGINT.
  """
  settings = resuming.RunSettings(
    run_dir=files.local_folder(model_dir, 'MODEL_DIR'),
    train_steps=train_steps,
    log_period=log_period,
    checkpoint_period=checkpoint_period,
    keep_checkpoints=keep_checkpoints,
    preemption_grace_secs=preemption_grace_secs,
    profile_steps=profile_steps,
    hooks=hooks,
    trackers=trackers,
  )
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
  if dry_run:  # Which needs no data.
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
  """Returns the system with the LLM of the run, or with its cached states."""
  return session_lib.with_cached_states(
    run_folder.pin_llm(model, run_dir), task
  )


def _transform(
  optimizer: optim.Optimizer, session: session_lib.Session
) -> optax.GradientTransformation:
  """Returns the optimizer of the parameters that a system trains."""
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
  """Takes the steps that are left, and calls what is due after each.

  Args:
    loop: the run.
    parts: of batches that were not trained on yet.
    compiled: the training step.
    mesh: the device mesh.
    hooked: what is called beside the steps.

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
        # A kill may have come before an evaluation.
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
      loop.say(f'Saved step {loop.step}. Start again to go on from there.')
      raise SystemExit(loop.watcher.exit_code) from None


def _parts(
  batches: bound_tasks.TrainBatches, loop: hooks_lib.Loop
) -> Iterator[batching.Part]:
  """Returns the parts of the batches for the steps that are left.

  The first is there when it returns; says how long passing over others took.
  """
  if loop.step >= loop.train_steps:
    return iter(())
  parts = batches.parts()
  start_secs = time.perf_counter()
  with progress_lib.reminding():
    first = next(parts, None)
    distributed.wait_for_all('the first batch')
  if first is None:
    raise ValueError(
      f"task {loop.kind['task']!r} has no examples in split 'train'."
    )
  if loop.step:
    loop.say(
      f'Goes on at step {loop.step}; {loop.num_rows} rows were passed over in '
      f'{time.perf_counter() - start_secs:.1f} s.'
    )
  return itertools.chain([first], parts)
