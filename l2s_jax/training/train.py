# SPDX-License-Identifier: Apache-2.0
"""Training: LLM-to-SLM, or a language model alone, on any mesh.

Mesh, system, shardings, state, data, step, loop, in this order. Gradients are
taken of the trainable parameters alone; the frozen LLM goes in as an argument
and never comes out.
"""

import contextlib
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import jax
import optax
import tqdm

from l2s_jax.data import batching, bound_tasks
from l2s_jax.evaluation import metric_writer
from l2s_jax.models import flops, l2s, language_model, losses
from l2s_jax.runtime import (
  distributed,
  files,
  gin_config,
  locks,
  partitioning,
  preemption,
  profiling,
)
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import session as session_lib
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint, eval_plan, optim, train_step
from l2s_jax.training import hooks as hooks_lib
from l2s_jax.training import progress as progress_lib
from l2s_jax.training import state as state_lib


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
  eval_period: int | None = None,
  eval_split: str = 'validation',
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
    eval_period: steps between evaluations; None evaluates at the end.
    eval_split: of the task.
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
    dry_run: prints sizes and shardings, and stops.

  Returns:
    The last evaluation, by metric name.

  Raises:
    ValueError: for settings that do not fit each other, before compilation.
    FloatingPointError: if a loss is not finite.
    SystemExit: after SIGTERM or SIGINT.
  """
  began = time.time()
  if train_steps != 0:  # It is a run of the model as it came.
    gin_config.check_positive(TRAIN_STEPS=train_steps)
  gin_config.check_positive(
    BATCH_SIZE=batch_size,
    NUM_MICROBATCHES=num_microbatches,
    EVAL_PERIOD=eval_period,
    CHECKPOINT_PERIOD=checkpoint_period,
    KEEP_CHECKPOINTS=keep_checkpoints,
    PREEMPTION_GRACE_SECS=preemption_grace_secs,
    log_period=log_period,
    num_eval_examples=num_eval_examples,
    eval_batch_size=eval_batch_size,
  )
  gin_config.check_lengths(task_feature_lengths)
  gin_config.check_between(0, gin_config.LARGEST, SEED=seed)
  gin_config.check_between(0, 1, LABEL_SMOOTHING=label_smoothing)
  gin_config.check_between(0, math.inf, Z_LOSS=z_loss)
  profiling.check(profile_steps)
  hooks_lib.check(hooks)
  run_dir = files.local_folder(model_dir, 'MODEL_DIR')
  buckets = batching.bucket_lengths(task_feature_lengths, length_buckets)
  if pack:
    _check_packing(model.module, length_buckets)
  plan = eval_plan.make(
    evaluations,
    eval_plan.Planned(
      mixture_or_task_name,
      eval_split,
      num_eval_examples,
      eval_period,
      task_feature_lengths,
    ),
    best_metric,
  )

  session = session_lib.start(
    lambda: session_lib.with_cached_states(
      run_folder.pin_llm(model, run_dir), mixture_or_task_name
    ),
    mesh,
    plan.longest(task_feature_lengths),
    batch_sizes={'BATCH_SIZE': batch_size, 'eval_batch_size': eval_batch_size},
    num_microbatches=num_microbatches,
  )
  task = session_lib.bind_task(session.system, mixture_or_task_name)
  if not dry_run:  # Which needs no data.
    task.check_data('train', task_feature_lengths)
  transform = optimizer.make(
    parameters.split(session.layout.axes, session.system.frozen)[1]
  )
  if dry_run:
    print(session.describe(_optimizer_bytes(session, transform)))
    return {}
  eval_tasks = plan.bind(session.system, task, mixture_or_task_name)
  kind = {
    'task': mixture_or_task_name,
    'data': task.data_settings(),
    'seed': seed,
    'task_feature_lengths': dict(task_feature_lengths),
    'optimizer': optimizer.description,
    'pack': pack or None,
    # Where a batch ends in the data depends on its size, too.
    'length_buckets': {
      'lengths': [list(bucket) for bucket in length_buckets],
      'batch_size': batch_size,
    }
    if length_buckets
    else None,
  }

  with session.entered(), contextlib.ExitStack() as opened:
    loop = _begin(
      opened,
      session,
      transform,
      run_dir,
      kind,
      began=began,
      train_steps=train_steps,
      log_period=log_period,
      keep_checkpoints=keep_checkpoints,
      grace_secs=preemption_grace_secs,
    )
    batches = opened.enter_context(
      contextlib.closing(
        task.train_batches(
          task_feature_lengths=task_feature_lengths,
          batch_size=batch_size,
          seed=seed,
          pack=pack,
          length_buckets=length_buckets,
          start_row=loop.num_rows,
          position=loop.position,
          rows=partitioning.own_rows(batch_size, session.mesh),
        )
      )
    )
    loss = functools.partial(
      losses.token_cross_entropy, label_smoothing=label_smoothing, z_loss=z_loss
    )
    step_fn = functools.partial(
      train_step.train_step,
      module=loop.system.module,
      optimizer=transform,
      loss=loss,
      num_microbatches=num_microbatches,
    )
    parts = batches.parts()
    first: list[batching.Part] = []
    compiled: dict[tuple[int, int], Any] = {}
    compile_secs = 0.0
    if loop.step < train_steps:
      first = [_first_part(parts, loop, mixture_or_task_name)]
      shapes = [(batch_size, *lengths) for lengths in buckets]
      compiled, compile_secs = _compile(step_fn, loop, session.mesh, shapes)
    evaluates = plan.hooks(
      loop, session, eval_tasks, eval_batch_size or batch_size
    )
    _run(
      loop,
      itertools.chain(first, parts),
      compiled,
      session.mesh,
      in_step=[
        hooks_lib.Profile(run_dir, profile_steps),
        hooks_lib.Log(
          log_period, optimizer.schedule, {'train/compile_secs': compile_secs}
        ),
      ],
      ours=[hooks_lib.SaveCheckpoint(checkpoint_period), *evaluates],
      users=hooks,
    )
    _say_what_was_cut(batches, loop, task_feature_lengths)
    return eval_plan.last_scores(evaluates)


def _run(
  loop: hooks_lib.Loop,
  parts: Iterator[batching.Part],
  compiled: Mapping[tuple[int, int], Any],
  mesh: jax.sharding.Mesh,
  *,
  in_step: Sequence[hooks_lib.Hook],
  ours: Sequence[hooks_lib.Hook],
  users: Sequence[hooks_lib.Hook],
) -> None:
  """Takes the steps that are left, and calls what is due after each.

  Args:
    loop: the run.
    parts: of batches that were not trained on yet.
    compiled: the training step, by the lengths of a batch.
    mesh: the device mesh.
    in_step: hooks under the lock: what they change belongs to the step.
    ours: hooks that follow it.
    users: hooks that follow those.

  Raises:
    FloatingPointError: if a loss is not finite.
    SystemExit: after SIGTERM or SIGINT; the last step is saved.
  """
  hooks = [*in_step, *ours, *users]
  loop.watcher.save = loop.save_and_wait
  with contextlib.ExitStack() as opened:
    for hook in hooks:
      opened.callback(hook.close)
    try:
      if loop.step or not loop.train_steps:
        hooks_lib.call(ours, loop)  # A kill may have come before an evaluation.
        if loop.metrics:
          hooks_lib.call(users, loop)
      while loop.step < loop.train_steps:
        loop.watcher.check()
        with loop.progress.waiting_for_data():
          part = next(parts)
        for hook in hooks:
          hook.before(loop)
        batch = partitioning.put_batch(
          part.batch, mesh, part.rows, part.num_rows
        )
        step_fn = compiled[batching.lengths(part.batch)]
        with loop.watcher.lock:
          loop.state, sums = step_fn(loop.state, loop.frozen, batch)
          loop.step += 1
          loop.num_rows += part.num_rows
          loop.position = part.position
          loop.metrics = {}
          loop.progress.add(loop.step, sums, part)
          hooks_lib.call(in_step, loop)
        loop.bar.update()
        hooks_lib.call([*ours, *users], loop)
    except preemption.Preempted:
      loop.watcher.leave()
      loop.save_and_wait()
      loop.say(f'Saved step {loop.step}. Start again to go on from there.')
      raise SystemExit(loop.watcher.exit_code) from None


def _begin(
  opened: contextlib.ExitStack,
  session: session_lib.Session,
  optimizer: optax.GradientTransformation,
  run_dir: pathlib.Path,
  kind: Mapping[str, Any],
  *,
  began: float,
  train_steps: int,
  log_period: int,
  keep_checkpoints: int | None,
  grace_secs: int,
) -> hooks_lib.Loop:
  """Returns a run where it goes on: what an earlier start has left, or step 0.

  Args:
    opened: closes what is opened here.
    session: the system and its layout.
    optimizer: of the trainable parameters.
    run_dir: the run's folder.
    kind: what the order of examples and the optimizer's slots depend on; has
      the 'seed'.
    began: seconds since the epoch, of a run that begins.
    train_steps: updates in all.
    log_period: steps between lines in the log.
    keep_checkpoints: the newest so many are kept; None keeps all.
    grace_secs: between SIGTERM and the end of the process.
  """
  watcher = opened.enter_context(distributed.watch_preemption(grace_secs))
  if distributed.is_first():
    opened.enter_context(locks.held(run_dir, 'MODEL_DIR'))
  system, frozen = parameters.load_frozen(session.system, session.layout)
  watcher.exit_if_requested()
  run_folder.save(system, run_dir)
  checkpointer = opened.enter_context(
    contextlib.closing(checkpoint.Checkpointer(run_dir, keep=keep_checkpoints))
  )
  position = check_position(checkpointer.restore_data(), kind, run_dir)
  state = restore_or_create(
    system, session.layout, optimizer, session.mesh, checkpointer, kind['seed']
  )
  watcher.exit_if_requested()
  step = int(state.step)
  if distributed.is_first():
    with files.whole(run_dir / 'config.gin') as file:
      file.write(gin_config.operative_config())
  log = metric_writer.MetricWriter(
    run_dir,
    first_step=step,
    # The end of a run that goes on now was no end of a period.
    drop=('train/',) if step % log_period and step < train_steps else (),
  )
  progress = progress_lib.Progress(
    run_dir,
    position['sums'],
    clock=position.get('clock') or {'began': began, 'productive_secs': 0.0},
    example_flops=functools.partial(
      flops.train_flops,
      system.module,
      llm_reads=system.cached_states is None,
    ),
  )
  return hooks_lib.Loop(
    run_dir=run_dir,
    system=system,
    train_steps=train_steps,
    state=state,
    frozen=frozen,
    step=step,
    num_rows=position['num_rows'],
    position=position.get('position'),
    kind=kind,
    progress=progress,
    log=opened.enter_context(contextlib.closing(log)),
    bar=opened.enter_context(_bar(run_dir, step, train_steps)),
    checkpointer=checkpointer,
    watcher=watcher,
  )


def _first_part(
  parts: Iterator[batching.Part], loop: hooks_lib.Loop, name: str
) -> batching.Part:
  """Returns the first batch; says how long passing over others has taken."""
  start_secs = time.perf_counter()
  with progress_lib.reminding():
    part = next(parts, None)
    distributed.wait_for_all('the first batch')
  if part is None:
    raise ValueError(f"task {name!r} has no examples in split 'train'.")
  if loop.step:
    loop.say(
      f'Goes on at step {loop.step}; {loop.num_rows} rows were passed over in '
      f'{time.perf_counter() - start_secs:.1f} s.'
    )
  return part


def _compile(
  step_fn: Any,
  loop: hooks_lib.Loop,
  mesh: jax.sharding.Mesh,
  shapes: Sequence[tuple[int, int, int]],
) -> tuple[dict[tuple[int, int], Any], float]:
  """Returns the step compiled for each pair of lengths, and how long that took.

  Ahead of the loop: compilation holds no lock and enters no timing.
  """
  start_secs = time.perf_counter()
  jitted = jax.jit(
    step_fn,
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda x: x.sharding, loop.state), None),
  )
  compiled = {}
  for shape in shapes:
    example = loop.system.example_batch(
      *shape, sharding=partitioning.batch_sharding(mesh)
    )
    compiled[shape[1:]] = jitted.lower(
      loop.state, loop.frozen, example
    ).compile()
    loop.watcher.exit_if_requested()
  secs = time.perf_counter() - start_secs
  loop.say(f'Compiled the training step in {secs:.1f} s.')
  return compiled, secs


def _say_what_was_cut(
  batches: bound_tasks.TrainBatches,
  loop: hooks_lib.Loop,
  task_feature_lengths: Mapping[str, int],
) -> None:
  if batches.num_truncated_prompts or batches.num_truncated_targets:
    loop.say(
      f'Of {batches.num_examples} examples, '
      f'{batches.num_truncated_prompts} prompts and '
      f'{batches.num_truncated_targets} answers were longer than '
      f'{dict(task_feature_lengths)} tokens and were cut.'
    )


def check_position(
  position: Mapping[str, Any] | None,
  kind: Mapping[str, Any],
  run_dir: pathlib.Path,
) -> Mapping[str, Any]:
  """Returns where training goes on: 'num_rows', 'sums' and 'clock'.

  Args:
    position: from the checkpoint; None at the start.
    kind: what the order of examples and the optimizer's slots depend on.
    run_dir: the run's folder, for the error.

  Raises:
    ValueError: if that was otherwise at the checkpoint; lists the differences.
  """
  if position is None:
    return {'num_rows': 0, 'sums': {}, 'clock': None}
  differences = files.differences(
    {name: position.get(name) for name in kind}, kind
  )
  if differences:
    raise ValueError(
      f'{run_dir} holds a run that was trained otherwise so far: its place in '
      'the data, or what its optimizer holds, means nothing now. Set these as '
      'they were, or choose another MODEL_DIR:\n' + '\n'.join(differences)
    )
  return position


def _check_packing(
  module: l2s.LlmToSlm | language_model.LanguageModel,
  length_buckets: batching.LengthBuckets,
) -> None:
  """Refuses a model that would read the examples of a row as one text."""
  if length_buckets:
    raise ValueError(
      f'PACK=True and LENGTH_BUCKETS={length_buckets!r}: packed rows are all '
      'of one length. Set PACK=False or LENGTH_BUCKETS=().'
    )
  if isinstance(module, l2s.LlmToSlm):
    configs = {'the LLM': module.llm_config, 'the SLM': module.slm_config}
  else:
    configs = {'the model': module.config}
  names = [
    name for name, config in configs.items() if not config.is_encoder_decoder
  ]
  if names:
    raise ValueError(
      'PACK=True, but what is decoder-only reads a row as one text: '
      f'{" and ".join(names)}. Set PACK=False, and LENGTH_BUCKETS to have '
      'batches with less padding.'
    )


def restore_or_create(
  system: system_lib.System,
  layout: parameters.Layout,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  checkpointer: checkpoint.Checkpointer,
  seed: int,
) -> state_lib.TrainState:
  """Returns the newest state of the run, or of a run that begins the first.

  What comes from weights is read, and the rest initialised: nothing is in
  memory twice.
  """
  shapes, shardings = _state_shapes(system, layout, optimizer, mesh)
  restored = checkpointer.restore(shapes, shardings)
  if restored is not None:
    return restored
  params = parameters.load_pretrained(system, layout)
  fresh = {
    name: tree
    for name, tree in shardings.trainable.items()
    if name not in params
  }
  if fresh:
    init = functools.partial(parameters.init, system, only=fresh.keys())
    params |= state_lib.init_params(init, seed, fresh)
  create = jax.jit(
    lambda trainable: state_lib.create(trainable, optimizer, seed),
    out_shardings=shardings,
  )
  return create(params)


def _state_shapes(
  system: system_lib.System,
  layout: parameters.Layout,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[state_lib.TrainState, state_lib.TrainState]:
  """Returns the shapes and the shardings of the state."""
  _, shapes = parameters.split(layout.shapes, system.frozen)
  _, shardings = parameters.split(layout.shardings, system.frozen)
  return state_lib.shardings(shapes, shardings, optimizer, mesh)


def _optimizer_bytes(
  session: session_lib.Session, optimizer: optax.GradientTransformation
) -> int:
  """Returns what the optimizer's state takes on a device."""
  shapes, shardings = _state_shapes(
    session.system, session.layout, optimizer, session.mesh
  )
  return partitioning.bytes_per_device(shapes.opt_state, shardings.opt_state)


def _bar(run_dir: pathlib.Path, step: int, train_steps: int) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=train_steps,
    initial=step,
    desc=run_dir.name,
    unit='step',
    dynamic_ncols=True,
    disable=not distributed.is_first(),
  )
