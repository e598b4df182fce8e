# SPDX-License-Identifier: Apache-2.0
"""Training: LLM-to-SLM, or a language model alone, on any mesh.

Mesh, system, shardings, state, data, step, loop, in this order. Gradients are
taken of the trainable parameters alone; the frozen LLM goes in as an argument
and never comes out.
"""

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import optax
import tqdm

from l2s_jax import (
  batch_keys,
  checkpoint,
  costs,
  data,
  distributed,
  evaluate,
  files,
  gin_utils,
  locks,
  losses,
  metric_writer,
  optim,
  parameters,
  partition,
  preemption,
  profiling,
  systems,
  tasks,
)
from l2s_jax import progress as progress_lib
from l2s_jax import state as state_lib
from l2s_jax.models import l2s, language_model

PyTree = Any


def train_step(
  state: state_lib.TrainState,
  frozen: PyTree,
  batch: Mapping[str, jax.Array],
  *,
  module: Any,
  optimizer: optax.GradientTransformation,
  loss: Callable[..., Any] = losses.token_cross_entropy,
  num_microbatches: int = 1,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and sums to log.

  Args:
    state: before the update; donated.
    frozen: parameters that get no gradient.
    batch: the keys of `features.py`.
    module: computes logits from all parameters and the batch.
    optimizer: of the trainable parameters.
    loss: `losses.token_cross_entropy`, perhaps with other weights in it.
    num_microbatches: parts of the batch that are computed one after another,
      in less memory; sums and gradients add up to those of the whole.
  """
  dropout_key = jax.random.fold_in(
    jax.random.wrap_key_data(state.key), state.step
  )

  def loss_fn(trainable, batch, key):
    logits = module.apply(
      {'params': state_lib.merge(frozen, trainable)},
      batch,
      deterministic=False,
      rngs={'dropout': key},
    )
    return loss(
      logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
    )

  def gradient_sums(batch, key):  # no gradient of the LLM
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (_, sums), grads = grad_fn(state.trainable, batch, key)
    return sums, grads

  sums, grads = _add_up(gradient_sums, batch, dropout_key, num_microbatches)
  weight = jnp.maximum(sums['loss_weight'], 1.0)
  grads = jax.tree.map(lambda g: g / weight, grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  new_state = state.replace(
    step=state.step + 1,
    trainable=optax.apply_updates(state.trainable, updates),
    opt_state=opt_state,
  )
  return new_state, {
    **sums,
    'grad_norm': optax.tree.norm(grads),
    'param_norm': optax.tree.norm(new_state.trainable),
  }


def _add_up(
  fn: Callable[[Mapping[str, jax.Array], jax.Array], PyTree],
  batch: Mapping[str, jax.Array],
  key: jax.Array,
  num_microbatches: int,
) -> PyTree:
  """Returns the sum of `fn` over microbatches, each with a key of its own."""
  if num_microbatches == 1:
    return fn(batch, key)

  def divide(x):  # Every n-th row to each, so that rows stay on their devices.
    rows = x.reshape(-1, num_microbatches, *x.shape[1:])
    return jnp.moveaxis(rows, 1, 0)

  microbatches = (
    jax.tree.map(divide, batch),
    jax.random.split(key, num_microbatches),
  )
  first = jax.tree.map(lambda x: x[0], microbatches)
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *first)
  )
  total, _ = jax.lax.scan(
    lambda total, inputs: (
      jax.tree.map(jnp.add, total, fn(*inputs)),
      None,
    ),
    zeros,
    microbatches,
  )
  return total


@gin.configurable(module='l2s_jax')
def train(
  model: systems.System = gin.REQUIRED,
  mixture_or_task_name: str = gin.REQUIRED,
  task_feature_lengths: Mapping[str, int] = gin.REQUIRED,
  train_steps: int = gin.REQUIRED,
  model_dir: str = gin.REQUIRED,
  batch_size: int = gin.REQUIRED,
  optimizer: optim.Optimizer = gin.REQUIRED,
  mesh: partition.MeshConfig | None = None,
  num_microbatches: int = 1,
  pack: bool = False,
  length_buckets: data.LengthBuckets = (),
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
      `data.bucket_lengths` takes them. A step is compiled for each.
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
    gin_utils.check_positive(TRAIN_STEPS=train_steps)
  gin_utils.check_positive(
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
  gin_utils.check_lengths(task_feature_lengths)
  gin_utils.check_between(0, gin_utils.LARGEST, SEED=seed)
  gin_utils.check_between(0, 1, LABEL_SMOOTHING=label_smoothing)
  gin_utils.check_between(0, math.inf, Z_LOSS=z_loss)
  _check_best_split(best_metric, eval_split)
  profiling.check(profile_steps)
  run_dir = systems.local_folder(model_dir, 'MODEL_DIR')
  mesh_config = mesh or partition.MeshConfig()
  device_mesh = partition.make_mesh(mesh_config)
  partition.check_batch_size(
    batch_size, device_mesh, num_microbatches=num_microbatches
  )
  buckets = data.bucket_lengths(task_feature_lengths, length_buckets)
  if pack:
    _check_packing(model.module, length_buckets)
  if eval_batch_size is not None:
    partition.check_batch_size(eval_batch_size, device_mesh, 'eval_batch_size')
  system = systems.pin_llm(systems.with_rules(model, mesh_config), run_dir)
  task = evaluate.bind_task(system, mixture_or_task_name)
  if not dry_run:  # which needs no data
    evaluate.check_splits(
      task, task_feature_lengths, read=('train',), evaluated=eval_split
    )
    evaluate.check_score('BEST_METRIC', best_metric, task, eval_split)

  with (
    partition.use_mesh(device_mesh),
    partition.axis_rules(mesh_config.rules('slm')),
    contextlib.ExitStack() as opened,
  ):
    layout = parameters.layout(system, device_mesh, mesh_config)
    transform = optimizer.make(state_lib.split(layout.axes, system.frozen)[1])
    parameters.check_lengths(system, layout, task_feature_lengths)
    if dry_run:
      print(parameters.summary(system, layout, transform, device_mesh))
      return {}

    watcher = opened.enter_context(
      distributed.watch_preemption(preemption_grace_secs)
    )
    if distributed.is_first():
      opened.enter_context(locks.held(run_dir, 'MODEL_DIR'))
    system, frozen = parameters.load_frozen(system, layout)
    watcher.exit_if_requested()
    systems.save(system, run_dir)

    checkpointer = opened.enter_context(
      contextlib.closing(
        checkpoint.Checkpointer(run_dir, keep=keep_checkpoints)
      )
    )
    kind = {
      'task': mixture_or_task_name,
      'data': tasks.data_settings(mixture_or_task_name),
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
    position = check_position(checkpointer.restore_data(), kind, run_dir)
    state = restore_or_create(
      system, layout, transform, device_mesh, checkpointer, seed
    )
    watcher.exit_if_requested()
    step, num_rows = int(state.step), position['num_rows']
    if distributed.is_first():
      with files.whole(run_dir / 'config.gin') as file:
        file.write(gin_utils.operative_config())

    evaluator = evaluate.Evaluator(
      system,
      device_mesh,
      task,
      task_feature_lengths,
      split=eval_split,
      batch_size=eval_batch_size or batch_size,
      num_examples=num_eval_examples,
    )
    batches = opened.enter_context(
      contextlib.closing(
        data.train_batches(
          task,
          task_feature_lengths=task_feature_lengths,
          batch_size=batch_size,
          seed=seed,
          pack=pack,
          length_buckets=length_buckets,
          start_row=num_rows,
        )
      )
    )
    log = opened.enter_context(
      contextlib.closing(
        metric_writer.MetricWriter(
          run_dir,
          first_step=step,
          # The end of a run that goes on now was no end of a period.
          drop=('train/',) if step % log_period and step < train_steps else (),
        )
      )
    )
    evaluations = {
      int(step): scores
      for step, scores in distributed.from_first(
        metric_writer.by_step(run_dir, prefix='eval/')
      ).items()
    }
    bar = opened.enter_context(_bar(run_dir, step, train_steps))
    step_fn = jax.jit(
      functools.partial(
        train_step,
        module=system.module,
        optimizer=transform,
        loss=functools.partial(
          losses.token_cross_entropy,
          label_smoothing=label_smoothing,
          z_loss=z_loss,
        ),
        num_microbatches=num_microbatches,
      ),
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    host_batch: data.Batch | None = None
    if step < train_steps:
      start_secs = time.perf_counter()
      with progress_lib.reminding():
        host_batch = next(batches, None)
        distributed.wait_for_all('the first batch')
      if host_batch is None:
        raise ValueError(
          f"task {mixture_or_task_name!r} has no examples in split 'train'."
        )
      if step:
        bar.write(
          f'Goes on at step {step}; {num_rows} rows were passed over in '
          f'{time.perf_counter() - start_secs:.1f} s.'
        )
      # Ahead of the loop: compilation holds no lock and enters no timing.
      start_secs = time.perf_counter()
      compiled_steps = {}
      for lengths in buckets:
        example = batch_keys.example_batch(
          batch_size,
          *lengths,
          sharding=partition.batch_sharding(device_mesh),
        )
        compiled_steps[lengths] = step_fn.lower(
          state, frozen, example
        ).compile()
        watcher.exit_if_requested()
      compile_secs = time.perf_counter() - start_secs
      bar.write(f'Compiled the training step in {compile_secs:.1f} s.')
    profiler = opened.enter_context(
      contextlib.closing(profiling.Profiler(run_dir, profile_steps))
    )
    progress = progress_lib.Progress(
      run_dir,
      position['sums'],
      clock=position.get('clock') or {'began': began, 'productive_secs': 0.0},
      example_flops=functools.partial(costs.train_flops, system.module),
    )

    def save() -> None:
      with watcher.lock:
        progress.settle()
        checkpointer.save(
          state,
          kind
          | {
            'num_rows': num_rows,
            'sums': progress.sums,
            'clock': progress.clock(),
          },
          system.describe(),
        )

    def save_and_wait() -> None:
      save()
      checkpointer.wait()

    def is_evaluated() -> bool:
      return step == train_steps or bool(eval_period and not step % eval_period)

    watcher.save = save_and_wait
    _keep_best(checkpointer, best_metric, evaluations)
    try:
      while True:
        # Also after a restart: a kill may have come before the evaluation.
        if not train_steps:
          save()
        is_due = bool(step or not train_steps) and is_evaluated()
        if is_due and step not in evaluations:
          with progress.paused():
            params = state_lib.merge(frozen, state.trainable)
            scores = evaluator.evaluate(
              params, step=step, output_dir=run_dir, stop=watcher.check
            )
          log.write(step, {f'eval/{k}': v for k, v in scores.items()})
          evaluations[step] = scores
          line = evaluate.format_scores(scores, evaluator.signatures)
          bar.write(f'step {step}: {line}')
          _keep_best(checkpointer, best_metric, evaluations)
        if step >= train_steps:
          break
        watcher.check()

        if host_batch is None:
          with progress.waiting_for_data():
            host_batch = next(batches)
        profiler.before(step + 1)
        batch = partition.put_batch(host_batch, device_mesh)
        compiled_step = compiled_steps[data.lengths(host_batch)]
        with watcher.lock:
          state, sums = compiled_step(state, frozen, batch)
          step += 1
          num_rows += batch_size
          progress.add(step, sums, host_batch)
          if profiler.is_last(step):
            progress.settle()
            profiler.close()
          if step % log_period == 0 or step == train_steps:
            summary = progress.summary()
            if step % log_period == 0:
              progress.restart()
            summary['train/learning_rate'] = float(optimizer.schedule(step - 1))
            summary['train/compile_secs'] = compile_secs
            log.write(step, summary)
            bar.set_postfix_str(
              f'loss {summary["train/loss"]:.3f}, '
              f'{summary["train/target_tokens_per_sec"]:.0f} target tokens/s'
            )
        host_batch = None
        bar.update()
        if step % checkpoint_period == 0 or is_evaluated():
          save()
    except preemption.Preempted:
      watcher.leave()
      save_and_wait()
      bar.write(f'Saved step {step}. Start again to go on from there.')
      raise SystemExit(watcher.exit_code) from None

    if batches.num_truncated_prompts or batches.num_truncated_targets:
      bar.write(
        f'Of {batches.num_examples} examples, '
        f'{batches.num_truncated_prompts} prompts and '
        f'{batches.num_truncated_targets} answers were longer than '
        f'{dict(task_feature_lengths)} tokens and were cut.'
      )
    return evaluations[max(evaluations)] if evaluations else {}


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


def _check_best_split(best_metric: str | None, eval_split: str) -> None:
  if best_metric is not None and 'test' in eval_split:
    raise ValueError(
      f'BEST_METRIC={best_metric!r} with eval_split={eval_split!r}: a '
      'checkpoint is chosen on validation data only. Set train.eval_split to '
      "'validation', and score the chosen checkpoint on the test split with "
      "evaluate and EVAL_STEPS='best'."
    )


def _check_packing(
  module: l2s.LlmToSlm | language_model.LanguageModel,
  length_buckets: data.LengthBuckets,
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


def _keep_best(
  checkpointer: checkpoint.Checkpointer,
  metric: str | None,
  evaluations: Mapping[int, Mapping[str, float]],
) -> None:
  if metric is None:
    return
  scores = {
    step: row[metric] for step, row in evaluations.items() if metric in row
  }
  if evaluations and not scores:  # Of a metric that is not of metrics.py.
    raise ValueError(
      f'BEST_METRIC={metric!r} is not among the scores of the evaluation: '
      f'{", ".join(evaluations[max(evaluations)])}.'
    )
  checkpointer.keep_best(metric, scores)


def restore_or_create(
  system: systems.System,
  layout: parameters.Layout,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  checkpointer: checkpoint.Checkpointer,
  seed: int,
) -> state_lib.TrainState:
  """Returns the newest state of the run, or of a run that begins the first."""
  _, trainable_shapes = state_lib.split(layout.shapes, system.frozen)
  _, trainable_shardings = state_lib.split(layout.shardings, system.frozen)
  shapes, shardings = state_lib.shardings(
    trainable_shapes, trainable_shardings, optimizer, mesh
  )
  restored = checkpointer.restore(shapes, shardings)
  if restored is not None:
    return restored

  def init(key):
    boxed = parameters.init(system, key)['params']
    return {'params': state_lib.split(boxed, system.frozen)[1]}

  params = state_lib.init_params(init, seed, trainable_shardings)
  params = parameters.load_pretrained(system, layout, params)
  create = jax.jit(
    lambda trainable: state_lib.create(trainable, optimizer, seed),
    out_shardings=shardings,
  )
  return create(params)


def _bar(run_dir: pathlib.Path, step: int, train_steps: int) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=train_steps,
    initial=step,
    desc=run_dir.name,
    unit='step',
    dynamic_ncols=True,
    disable=not distributed.is_first(),
  )
