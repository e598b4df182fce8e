# SPDX-License-Identifier: Apache-2.0
"""LLM-to-SLM as a T5X model, for T5X's own train, eval, infer and export.

A run (`model.json` and vocabularies) defines the system. T5X provides the
train state, checkpoints, datasets and loops; module, batch keys and parameters
are those of l2s_jax. `gin_configs/t5x/` configures the classes of this module,
`docs/t5x.md` describes the use, and `t5x_state` converts train states. This
module requires T5X.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
from flax.linen import partitioning as flax_partitioning
from t5x import adafactor as t5x_adafactor
from t5x import decoding, losses, models, optimizers

from l2s_jax.data import features, seqio_internals, tasks
from l2s_jax.data.features import seqio, tf
from l2s_jax.models import batch_keys, l2s
from l2s_jax.models import cache as cache_lib
from l2s_jax.runtime import partitioning
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.training import adafactor

PyTree = Any
Params = dict[str, Any] | flax.core.FrozenDict
Batch = Mapping[str, jax.Array]

_KEY_VALUES = ('kv', 'cross_kv')


class FeatureConverter(features.L2SFeatureConverter):
  """Makes batches with exactly the keys that the model reads."""

  MODEL_FEATURES = {
    key: features.L2SFeatureConverter.MODEL_FEATURES[key]
    for key in batch_keys.KEYS
  }

  def __init__(
    self,
    *,
    prompt_vocabulary: features.SeqioVocabulary,
    answer_vocabulary: features.SeqioVocabulary,
    pack: bool = False,
    **unused: Any,
  ):
    """Sets the vocabularies and the options of T5X's DatasetConfig.

    Args:
      prompt_vocabulary: vocabulary of `inputs`.
      answer_vocabulary: vocabulary of `targets`.
      pack: whether to pack several examples into a row.
      **unused: options of T5X's other feature converters, such as
        `use_custom_packing_ops`.
    """
    super().__init__(prompt_vocabulary, answer_vocabulary, pack=pack)


class TrainedAlone(optimizers.OptimizerDef):
  """Applies an optimizer to the trained parameters only.

  Frozen parameters have no optimizer state, in memory and in checkpoints.
  """

  def __init__(
    self,
    optimizer_def: optimizers.OptimizerDef,
    is_trained: Callable[[str], bool],
  ):
    """Wraps an optimizer.

    Args:
      optimizer_def: T5X optimizer of the trained parameters.
      is_trained: whether the parameter of a path ('/' between keys) is trained.
    """
    self._inner = optimizer_def
    self._is_trained = is_trained

  @property
  def hyper_params(self) -> Any:
    return self._inner.hyper_params

  def _trained(self, tree: Params) -> PyTree:
    """Returns the trained part of a pytree."""
    return flax.core.freeze(self._split(tree)[0])

  def _split(self, tree: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the trained and the frozen part of a pytree."""
    return parameters.split_by_path(flax.core.unfreeze(tree), self._is_trained)

  def init_state(self, params: Params) -> optimizers.OptimizerState:
    return self._inner.init_state(self._trained(params))

  def apply_gradient(
    self,
    hyper_params: Any,
    params: Params,
    state: optimizers.OptimizerState,
    grads: Params,
  ) -> tuple[Params, optimizers.OptimizerState]:
    trained, held = self._split(params)
    new, state = self._inner.apply_gradient(
      hyper_params, flax.core.freeze(trained), state, self._trained(grads)
    )
    merged = parameters.merge(flax.core.unfreeze(new), held)
    return flax.core.freeze(merged), state

  def update_hyper_params(self, **overrides: Any) -> Any:
    return self._inner.update_hyper_params(**overrides)

  def set_param_axes(self, param_logical_axes: Params) -> None:
    if hasattr(self._inner, 'set_param_axes'):
      self._inner.set_param_axes(self._trained(param_logical_axes))

  def derive_logical_axes(
    self, optimizer: optimizers.Optimizer, param_logical_axes: Params
  ) -> optimizers.Optimizer:
    axes = self._trained(param_logical_axes)
    inner = optimizers.Optimizer(
      self._inner, optimizer.state, self._trained(optimizer.target)
    )
    derived = self._inner.derive_logical_axes(inner, axes)
    return optimizers.Optimizer(self, derived.state, param_logical_axes)

  def state_dict(
    self, target: Params, state: optimizers.OptimizerState
  ) -> dict[str, Any]:
    found = self._inner.state_dict(self._trained(target), state)
    whole = flax.serialization.to_state_dict(target)
    return {**found, 'target': whole}

  def restore_state(
    self,
    opt_target: Params,
    opt_state: optimizers.OptimizerState,
    state_dict: Mapping[str, Any],
  ) -> tuple[Params, optimizers.OptimizerState]:
    target = flax.serialization.from_state_dict(
      opt_target, state_dict['target']
    )
    trained = self._split(state_dict['target'])[0]
    _, state = self._inner.restore_state(
      self._trained(opt_target), opt_state, {**state_dict, 'target': trained}
    )
    return target, state


class LlmToSlmModel(models.BaseTransformerModel):
  """The system of a run as a T5X model."""

  def __init__(
    self,
    run_dir: str,
    optimizer_def: optimizers.OptimizerDef,
    decode_fn: Callable[..., Any] = decoding.beam_search,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: float
    | str
    | losses.SpecialLossNormalizingFactor
    | None = None,
    dropout_rate: float | None = None,
    default_decoder_params: models.DecoderParams | None = None,
  ):
    """Loads the system of a run.

    Args:
      run_dir: MODEL_DIR of a run, also of TRAIN_STEPS = 0. It is only read.
      optimizer_def: T5X optimizer of the trained parameters.
      decode_fn: T5X's `decoding.beam_search` or `temperature_sample`.
      label_smoothing: as in T5X.
      z_loss: as in T5X.
      loss_normalizing_factor: as in T5X. 'NUM_REAL_TARGET_TOKENS' is the mean
        over target tokens, as in `training/train.py`.
      dropout_rate: dropout of the SLM; None: that of the run.
      default_decoder_params: as in T5X.

    Raises:
      FileNotFoundError: if `run_dir` is not a run.
    """
    self.system = _system(run_dir, dropout_rate)
    self._decoder_params = default_decoder_params or models.DecoderParams()
    prompt, answer = _vocabularies(run_dir)
    super().__init__(
      module=self.system.module,
      input_vocabulary=prompt,
      output_vocabulary=answer,
      optimizer_def=TrainedAlone(optimizer_def, is_trained(self.system)),
      decode_fn=decode_fn,
      label_smoothing=label_smoothing,
      z_loss=z_loss,
      loss_normalizing_factor=loss_normalizing_factor,
    )
    self.FEATURE_CONVERTER_CLS = functools.partial(
      FeatureConverter, prompt_vocabulary=prompt, answer_vocabulary=answer
    )

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None = None,
  ) -> flax.core.FrozenDict:
    """Returns random parameters, the LLM's included, with their logical axes.

    Pretrained weights come from a checkpoint written by `t5x_state.write`.
    """
    del input_shapes, input_types  # Parameter shapes do not depend on them.
    boxed = parameters.init(self.system, rng)
    _, axes = partitioning.abstract_params(
      functools.partial(parameters.init, self.system)
    )
    return flax.core.freeze(
      {**partitioning.unbox(boxed), 'params_axes': _axis_metadata(axes)}
    )

  def _placed(self) -> Any:
    """Returns the module with T5X's axis rules for the LLM, too."""
    if not isinstance(self.module, l2s.LlmToSlm):
      return self.module
    rules = tuple(flax_partitioning.get_axis_rules())
    return self.module.clone(llm_rules=rules)

  def _compute_logits(
    self,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
  ) -> jax.Array:
    return self._placed().apply(
      {'params': flax.core.unfreeze(params)},
      {key: batch[key] for key in batch_keys.KEYS},
      deterministic=dropout_rng is None,
      rngs=None if dropout_rng is None else {'dropout': dropout_rng},
    )

  def score_batch(
    self, params: Params, batch: Batch, return_intermediates: bool = False
  ) -> jax.Array:
    """Returns the log-probability of each answer, in nats, [batch].

    Raises:
      ValueError: if `return_intermediates` is set.
    """
    if return_intermediates:
      raise ValueError(
        'LlmToSlmModel does not return intermediates. Set '
        'score_batch.return_intermediates to False.'
      )
    log_probs = jax.nn.log_softmax(self._compute_logits(params, batch))
    of_targets = jnp.take_along_axis(
      log_probs, batch['decoder_target_tokens'][..., None], axis=-1
    )[..., 0]
    return (of_targets * batch['decoder_loss_weights']).sum(-1)

  def predict_batch_with_aux(
    self,
    params: Params,
    batch: Batch,
    rng: jax.Array | None = None,
    decoder_params: MutableMapping[str, Any] | None = None,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
    prompt_with_targets: bool = False,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Decodes answers with T5X's `decode_fn`.

    The LLM encodes each prompt once; the decode loop carries the SLM's cache.
    Arguments and results are those of T5X's `EncoderDecoderModel`.

    Raises:
      ValueError: if `prompt_with_targets` is set.
    """
    if prompt_with_targets:
      raise ValueError(
        'LlmToSlmModel decodes from the start of the answer. Set '
        'predict_batch_with_aux.prompt_with_targets to False.'
      )
    defaults = self._decoder_params
    if return_all_decodes is None:
      return_all_decodes = defaults.return_all_decodes
    num_decodes = num_decodes or defaults.num_decodes
    decoder_params = dict(decoder_params or {})
    decoder_params.setdefault('eos_id', self.output_vocabulary.eos_id)
    if rng is not None:
      decoder_params['decode_rng'] = rng
    first = jnp.zeros_like(batch['decoder_input_tokens'])
    module = l2s.for_generation(self._placed(), unstack_llm=False)
    prepared = l2s.params_for_generation(module, flax.core.unfreeze(params))
    cache = module.apply(
      {'params': prepared},
      {key: batch[key] for key in batch_keys.KEYS if key.startswith('encoder')},
      num_slots=first.shape[1] + 1,
      method='prefill',
    )
    writer, name = l2s.writer(module)
    decodes, scores = self.decode_fn(
      inputs=first,
      cache=_to_mapping(cache),
      tokens_to_logits=functools.partial(
        _next_logits,
        writer,
        l2s.writer_params(prepared, name),
        self.output_vocabulary.start_id,
      ),
      num_decodes=num_decodes,
      cache_offset=0,
      **decoder_params,
    )
    if return_all_decodes:
      return decodes, {'scores': scores}
    return decodes[:, -1, :], {'scores': scores[:, -1]}


def _system(run_dir: str, dropout_rate: float | None) -> system_lib.System:
  """Returns a run's system, with the given dropout unless it is None."""
  system = run_folder.load(run_dir)
  if dropout_rate is None:
    return system
  module = system.module
  field = 'slm_config' if isinstance(module, l2s.LlmToSlm) else 'config'
  config = dataclasses.replace(
    getattr(module, field), dropout_rate=dropout_rate
  )
  return dataclasses.replace(system, module=module.clone(**{field: config}))


def is_trained(system: system_lib.System) -> Callable[[str], bool]:
  """Returns a predicate: whether a system trains the parameter of a path.

  Paths have '/' between keys.
  """

  def check(path: str) -> bool:
    return path.split('/')[0] not in system.frozen and system.is_trained(path)

  return check


def _axis_metadata(axes: PyTree) -> dict[str, Any]:
  """Returns logical axes as T5X's collection `params_axes` holds them."""
  return {
    name if isinstance(value, Mapping) else f'{name}_axes': _axis_metadata(
      value
    )
    if isinstance(value, Mapping)
    else flax_partitioning.AxisMetadata(names=tuple(value))
    for name, value in axes.items()
  }


def _to_mapping(cache: cache_lib.Cache) -> dict[str, Any]:
  """Returns a cache as a mapping for T5X's decoding loops.

  The loops expand and reorder the rows of all arrays but `cache_index`.
  """
  rows: dict[str, Any] = {'valid': cache.valid}
  if cache.cross_valid is not None:
    rows['cross_valid'] = cache.cross_valid
  for name in _KEY_VALUES:
    layers = getattr(cache, name)
    if layers is not None:
      rows[name] = tuple((layer.key, layer.value) for layer in layers)
  return {'rows': rows, 'cache_index': cache.slot}


def _from_mapping(mapping: Mapping[str, Any]) -> cache_lib.Cache:
  """Inverts `_to_mapping`."""
  rows = dict(mapping['rows'])
  for name in _KEY_VALUES:
    if name in rows:
      rows[name] = tuple(cache_lib.KeyValues(*pair) for pair in rows[name])
  return cache_lib.Cache(slot=mapping['cache_index'], **rows)


def _next_logits(
  writer: Any, params: Params, start_id: int, state: decoding.DecodingState
) -> tuple[jax.Array, dict[str, Any]]:
  """Returns the logits of the next token of each row, and the cache."""
  is_first = jnp.reshape(jnp.equal(state.cur_index, 0), (-1, 1))
  # T5X starts every answer with id 0.
  token = jnp.where(is_first, start_id, state.cur_token)
  logits, cache = writer.apply(
    {'params': params}, token, _from_mapping(state.cache), method='extend'
  )
  return logits[:, 0], _to_mapping(cache)


@functools.cache
def _vocabularies(
  run_dir: str,
) -> tuple[features.SeqioVocabulary, features.SeqioVocabulary]:
  """Returns a run's vocabularies as SeqIO has them."""
  system = run_folder.load(run_dir)
  prompt, answer = system.prompt_vocabulary, system.answer_vocabulary
  wrapped = features.wrap_vocabulary(prompt)
  if prompt == answer:
    return wrapped, wrapped
  return wrapped, features.wrap_vocabulary(answer)


class InGraph(features.SeqioSentencePiece):
  """A SentencePiece vocabulary whose operations are in the exported graph."""

  @property
  def _tokenizer(self) -> Any:
    return features.tensorflow_text.SentencepieceTokenizer(self.model)

  def _decode_tf(self, ids: Any) -> Any:
    return self._tokenizer.detokenize(ids)


def output_features(run_dir: str) -> dict[str, seqio.Feature]:
  """Returns SeqIO's features with the vocabularies of a run, for T5X's export.

  Raises:
    ValueError: if TensorFlow has no operation for a vocabulary.
  """
  found = {}
  for name, wrapped in zip(
    ('inputs', 'targets'), _vocabularies(run_dir), strict=True
  ):
    if not isinstance(wrapped, features.SeqioSentencePiece):
      raise ValueError(
        f'T5X tokenizes `{name}` in the exported graph, but {wrapped} is not a '
        'SentencePiece model. Use `python -m l2s_jax export --to=savedmodel`.'
      )
    found[name] = seqio.Feature(InGraph(wrapped.vocabulary), add_eos=True)
  return found


def create_preprocessor(
  batch_size: int | None,
  output_features: Mapping[str, seqio.Feature],
  task_feature_lengths: Mapping[str, int],
  tokenized_inputs: bool = False,
) -> Any:
  """Returns T5X's preprocessor of exports, with the keys of `LlmToSlmModel`.

  Arguments and results are those of T5X's `export_lib.create_preprocessor`.
  """
  from t5x import export_lib

  of_t5x, signature = export_lib.create_preprocessor(
    batch_size, output_features, task_feature_lengths, tokenized_inputs
  )

  def preprocess(texts: Any) -> dict[str, Any]:
    batch = dict(of_t5x(texts))
    for part, tokens in (
      ('encoder', 'encoder_input_tokens'),
      ('decoder', 'decoder_target_tokens'),
    ):
      is_token = batch[tokens] != 0  # T5X pads with 0.
      batch[f'{part}_segment_ids'] = tf.cast(is_token, tf.int32)
    return batch

  return preprocess, signature


def bound_task(run_dir: str, name: str) -> str:
  """Registers a task with the vocabularies of a run and returns its new name.

  T5X compares the vocabularies of task and model, and finds tasks by name.

  Args:
    run_dir: MODEL_DIR of the run.
    name: MIXTURE_OR_TASK_NAME: a task or mixture of l2s_jax or of SeqIO's
      registry.

  Returns:
    The name of the registered task or mixture.

  Raises:
    ValueError: if there is no such task.
  """
  return _register(str(pathlib.Path(run_dir).resolve()), name)


@functools.cache
def _register(run_dir: str, name: str) -> str:
  """Implements `bound_task`, once per run and task."""
  prompt, answer = (wrapped.vocabulary for wrapped in _vocabularies(run_dir))
  suffix = f'_{prompt.fingerprint()[:6]}_{answer.fingerprint()[:6]}'

  def add(provider: 'seqio.Task | seqio.Mixture') -> str:
    label = re.sub(r'[^\w.]', '_', provider.name) + suffix
    if isinstance(provider, seqio.Mixture):
      rates = [
        (add(part), provider.rate_per_task_name[part.name])
        for part in seqio_internals.parts_of_mixture(provider)
      ]
      seqio.MixtureRegistry.add(label, rates)
    elif label not in seqio.TaskRegistry.names():
      # T5X looks a task up by its attribute `name`.
      seqio.TaskRegistry.add_provider(label, provider.replace(name=label))
    return label

  return add(tasks.bind(name, prompt, answer))


def logical_factor_rules() -> flax.core.FrozenDict:
  """Returns the axis roles of `training/adafactor.py` for T5X's Adafactor."""
  dims = t5x_adafactor.FactorDim
  rules: dict[str | None, Any] = {None: dims.NONE}
  for names, dim in (
    (adafactor.STACK_AXES, dims.BATCH),
    (adafactor.ROW_AXES, dims.ROW),
    (adafactor.COLUMN_AXES, dims.COLUMN),
    (adafactor.OTHER_AXES, dims.NONE),
  ):
    rules |= dict.fromkeys(names, dim)
  return flax.core.freeze(rules)
