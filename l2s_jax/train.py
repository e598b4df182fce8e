# SPDX-License-Identifier: Apache-2.0
"""Training: LLM-to-SLM, or a language model alone, on any mesh.

Mesh, system, shardings, state, data, step, loop, in this order. Gradients are
taken of the trainable parameters alone; the frozen LLM goes in as an argument
and never comes out.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp
import optax
import tqdm

from l2s_jax import (
  checkpoint,
  data,
  evaluate,
  files,
  gin_utils,
  losses,
  metric_writer,
  optim,
  parameters,
  partition,
  systems,
)
from l2s_jax import state as state_lib

PyTree = Any


def train_step(
  state: state_lib.TrainState,
  frozen: PyTree,
  batch: Mapping[str, jax.Array],
  *,
  module: Any,
  optimizer: optax.GradientTransformation,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and sums to log.

  Args:
    state: before the update; donated.
    frozen: parameters that get no gradient.
    batch: the keys of `features.py`.
    module: computes logits from all parameters and the batch.
    optimizer: of the trainable parameters.
  """
  dropout_key = jax.random.fold_in(
    jax.random.wrap_key_data(state.key), state.step
  )

  def loss_fn(trainable):
    logits = module.apply(
      {'params': state_lib.merge(frozen, trainable)},
      batch,
      deterministic=False,
      rngs={'dropout': dropout_key},
    )
    return losses.token_cross_entropy(
      logits, batch['decoder_target_tokens'], batch['decoder_loss_weights']
    )

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (_, sums), grads = grad_fn(state.trainable)  # no gradient of the LLM
  weight = jnp.maximum(sums['loss_weight'], 1.0)
  grads = jax.tree.map(lambda g: g / weight, grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  new_state = state.replace(
    step=state.step + 1,
    trainable=optax.apply_updates(state.trainable, updates),
    opt_state=opt_state,
  )
  return new_state, {**sums, 'grad_norm': optax.tree.norm(grads)}


@dataclasses.dataclass
class Progress:
  """Sums since the last log, and the clock they are divided by."""

  sums: dict[str, Any] = dataclasses.field(default_factory=dict)
  num_steps: int = 0
  prompt_tokens: int = 0
  start_secs: float = dataclasses.field(default_factory=time.perf_counter)

  def add(self, step_sums: Mapping[str, jax.Array], prompt_tokens: int) -> None:
    for name, value in step_sums.items():
      self.sums[name] = self.sums.get(name, 0.0) + value
    self.num_steps += 1
    self.prompt_tokens += prompt_tokens

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time inside out of the speeds."""
    jax.block_until_ready(self.sums)
    start_secs = time.perf_counter()
    yield
    self.start_secs += time.perf_counter() - start_secs

  def summary(self) -> dict[str, float]:
    """Returns what to log; waits for the last step."""
    sums = {k: float(v) for k, v in self.sums.items()}
    secs = time.perf_counter() - self.start_secs
    tokens = max(sums['loss_weight'], 1.0)
    return {
      'train/loss': sums['loss'] / tokens,
      'train/accuracy': sums['num_correct'] / tokens,
      'train/grad_norm': sums['grad_norm'] / self.num_steps,
      'train/target_tokens_per_sec': tokens / secs,
      'train/prompt_tokens_per_sec': self.prompt_tokens / secs,
      'train/secs_per_step': secs / self.num_steps,
    }


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
  eval_period: int | None = None,
  eval_split: str = 'validation',
  num_eval_examples: int | None = None,
  eval_batch_size: int | None = None,
  checkpoint_period: int = 1000,
  keep_checkpoints: int | None = 3,
  log_period: int = 50,
  seed: int = 0,
  *,
  dry_run: bool = False,
) -> dict[str, float]:
  """Trains a system and evaluates it as it goes; resumes by itself.

  Args:
    model: the system: LLM-to-SLM or a language model alone.
    mixture_or_task_name: SeqIO task or mixture to train on.
    task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer).
    train_steps: updates in all, those of earlier starts included.
    model_dir: the run's folder. Training goes on from its newest checkpoint.
    batch_size: examples a step, over all devices.
    optimizer: with its schedule.
    mesh: device mesh and axis rules; None puts all devices along `data`.
    eval_period: steps between evaluations; None evaluates at the end.
    eval_split: of the task.
    num_eval_examples: the first so many of the split; None takes all.
    eval_batch_size: examples a decoding batch; None takes `batch_size`.
    checkpoint_period: steps between saves; the last step is always saved.
    keep_checkpoints: the newest so many are kept; None keeps all.
    log_period: steps between lines in the log.
    seed: of initialisation, data order and dropout.
    dry_run: prints sizes and shardings, and stops.

  Returns:
    The last evaluation, by metric name.

  Raises:
    ValueError: for settings that do not fit each other, before compilation.
  """
  gin_utils.check_positive(
    TRAIN_STEPS=train_steps,
    BATCH_SIZE=batch_size,
    EVAL_PERIOD=eval_period,
    CHECKPOINT_PERIOD=checkpoint_period,
    log_period=log_period,
    eval_batch_size=eval_batch_size,
  )
  run_dir = systems.local_folder(model_dir, 'MODEL_DIR')
  mesh_config = mesh or partition.MeshConfig()
  device_mesh = partition.make_mesh(mesh_config)
  partition.check_batch_size(batch_size, device_mesh)
  if eval_batch_size is not None:
    partition.check_batch_size(eval_batch_size, device_mesh, 'eval_batch_size')
  system = systems.pin_llm(systems.with_rules(model, mesh_config), run_dir)
  task = evaluate.bind_task(system, mixture_or_task_name)
  if not dry_run:  # which needs no data
    evaluate.check_splits(
      task, task_feature_lengths, read=('train',), evaluated=eval_split
    )

  with (
    partition.use_mesh(device_mesh),
    partition.axis_rules(mesh_config.rules('slm')),
    contextlib.ExitStack() as opened,
  ):
    layout = parameters.layout(system, device_mesh, mesh_config)
    parameters.check_lengths(system, layout, task_feature_lengths)
    if dry_run:
      print(
        parameters.summary(system, layout, optimizer.transform, device_mesh)
      )
      return {}

    system, frozen = parameters.load_frozen(system, layout)
    systems.save(system, run_dir)

    checkpointer = opened.enter_context(
      contextlib.closing(
        checkpoint.Checkpointer(run_dir, keep=keep_checkpoints)
      )
    )
    state, position = restore_or_create(
      system, layout, optimizer.transform, device_mesh, checkpointer, seed
    )
    step = int(state.step)
    data_order = {
      'task': mixture_or_task_name,
      'seed': seed,
      'task_feature_lengths': dict(task_feature_lengths),
    }
    num_examples = check_position(position, data_order)
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
    batches = data.train_batches(
      task,
      task_feature_lengths=task_feature_lengths,
      batch_size=batch_size,
      seed=seed,
      start_example=num_examples,
    )
    step_fn = jax.jit(
      functools.partial(
        train_step, module=system.module, optimizer=optimizer.transform
      ),
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    log = opened.enter_context(
      contextlib.closing(metric_writer.MetricWriter(run_dir, first_step=step))
    )
    bar = opened.enter_context(_bar(run_dir, step, train_steps))
    prefetched = opened.enter_context(
      contextlib.closing(data.prefetch(batches))
    )

    scores = metric_writer.last(run_dir, prefix='eval/')
    progress = Progress()
    while step < train_steps:
      host_batch = next(prefetched, None)
      if host_batch is None:
        raise ValueError(
          f"task {mixture_or_task_name!r} has no examples in split 'train'."
        )
      batch = partition.put_batch(host_batch, device_mesh)
      state, sums = step_fn(state, frozen, batch)
      step += 1
      num_examples += batch_size
      progress.add(sums, int((host_batch['encoder_segment_ids'] > 0).sum()))
      bar.update()

      if step % log_period == 0 or step == train_steps:
        summary = progress.summary()
        summary['train/learning_rate'] = float(optimizer.schedule(step - 1))
        log.write(step, summary)
        bar.set_postfix_str(
          f'loss {summary["train/loss"]:.3f}, '
          f'{summary["train/target_tokens_per_sec"]:.0f} target tokens/s'
        )
        progress = Progress()
      # Before the save, so that a finished run has always been evaluated.
      if step == train_steps or (eval_period and step % eval_period == 0):
        with progress.paused():
          params = state_lib.merge(frozen, state.trainable)
          scores = evaluator.evaluate(params, step=step, output_dir=run_dir)
        log.write(step, {f'eval/{k}': v for k, v in scores.items()})
        bar.write(f'step {step}: {evaluate.format_scores(scores)}')
      if step % checkpoint_period == 0 or step == train_steps:
        checkpointer.save(state, data_order | {'num_examples': num_examples})

    if batches.num_truncated_prompts or batches.num_truncated_targets:
      bar.write(
        f'Of {batches.num_examples} examples, '
        f'{batches.num_truncated_prompts} prompts and '
        f'{batches.num_truncated_targets} answers were longer than '
        f'{dict(task_feature_lengths)} tokens and were cut.'
      )
    return scores


def check_position(
  position: Mapping[str, Any] | None, data_order: Mapping[str, Any]
) -> int:
  """Returns how many examples were trained on, in the order that goes on.

  Args:
    position: from the checkpoint; None at the start.
    data_order: what determines the order of examples now.

  Raises:
    ValueError: if the checkpoint's order was another.
  """
  if position is None:
    return 0
  found = {name: position[name] for name in data_order}
  if found != data_order:
    raise ValueError(
      f'The run has read its data as {found}, and is now to read them as '
      f'{dict(data_order)}; the position in one order means nothing in the '
      'other. Set these as they were, or choose another MODEL_DIR.'
    )
  return position['num_examples']


def restore_or_create(
  system: systems.System,
  layout: parameters.Layout,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  checkpointer: checkpoint.Checkpointer,
  seed: int,
) -> tuple[state_lib.TrainState, dict[str, Any] | None]:
  """Returns the newest state of the run and its data position.

  Of a run that begins: the first state, and None.
  """
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
  return create(params), None


def _bar(run_dir: pathlib.Path, step: int, train_steps: int) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=train_steps,
    initial=step,
    desc=run_dir.name,
    unit='step',
    dynamic_ncols=True,
    disable=jax.process_index() > 0,
  )
