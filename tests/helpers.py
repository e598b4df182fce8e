# SPDX-License-Identifier: Apache-2.0
"""Tiny models, parameters and batches that several test files share.

Sizes differ between LLM and SLM in every dimension, so that a mix-up shows in
a shape, and every parameter is random, biases and norm scales too, so that
one left out shows in the numbers.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import traverse_util

from l2s_jax.data import batching, packing, streams
from l2s_jax.inference import generate as generate_lib
from l2s_jax.inference import strategies
from l2s_jax.models import batch_keys, l2s, language_model
from l2s_jax.models import config as config_lib
from l2s_jax.runtime import files, partitioning
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, loading
from l2s_jax.weights import source

if TYPE_CHECKING:
  import seqio

Module = l2s.LlmToSlm | language_model.LanguageModel

BATCH_SIZE, PROMPT_LENGTH, ANSWER_LENGTH = 4, 7, 6
PROMPT_LENGTHS = (3, 7, 1, 5)
ANSWER_LENGTHS = (6, 2, 4, 1)

T5_1_0 = config_lib.TransformerConfig(
  vocab_size=264,
  emb_dim=16,
  num_heads=2,
  head_dim=4,
  mlp_dim=32,
  num_decoder_layers=2,
  num_encoder_layers=2,
  relpos_buckets=8,
  relpos_max_distance=12,
)
T5_1_1 = dataclasses.replace(
  T5_1_0,
  mlp_activations=('gelu', 'linear'),
  logits_via_embedding=False,
  scale_logits=False,
)
GPT2 = config_lib.TransformerConfig(
  vocab_size=264,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_decoder_layers=2,
  mlp_activations=('gelu',),
  norm='layer',
  norm_epsilon=1e-5,
  use_bias=True,
  positions='learned',
  max_positions=24,
  scale_attention=True,
  scale_logits=False,
  kernel_init_stddev=0.02,
  embedding_init_stddev=0.02,
)
OPT = dataclasses.replace(GPT2, mlp_activations=('relu',), position_offset=2)
PYTHIA = dataclasses.replace(
  GPT2,
  mlp_activations=('gelu_exact',),
  parallel_residual=True,
  positions='rotary',
  rope_dim=4,
  logits_via_embedding=False,
)
LLAMA = dataclasses.replace(
  GPT2,
  num_heads=6,
  num_kv_heads=2,
  mlp_activations=('silu', 'linear'),
  norm='rms',
  use_bias=False,
  attention_bias='qkv',
  positions='rotary',
  rope_scaling=(8.0, 1.0, 4.0, 12.0),
)
# Two such windows reach from the last token of a row to the first.
MISTRAL = dataclasses.replace(
  LLAMA, attention_bias='none', rope_scaling=(), sliding_window=5
)
QWEN2 = dataclasses.replace(
  LLAMA, rope_scaling=(), sliding_window=3, first_window_layer=1
)
OLMO2 = dataclasses.replace(
  LLAMA,
  attention_bias='none',
  rope_scaling=(),
  pre_norm=False,
  post_norm=True,
  qk_norm=True,
  qk_norm_all_heads=True,
)
SMOLLM3 = dataclasses.replace(
  LLAMA, attention_bias='none', rope_scaling=(), no_rope_period=2
)
QWEN3 = dataclasses.replace(
  LLAMA, attention_bias='all', qk_norm=True, rope_scaling=()
)
GEMMA3 = dataclasses.replace(
  LLAMA,
  num_kv_heads=1,
  num_decoder_layers=5,
  mlp_activations=('gelu', 'linear'),
  norm_unit_offset=True,
  post_norm=True,
  attention_bias='none',
  qk_norm=True,
  rope_base=1e6,
  rope_local_base=100.0,
  rope_scaling=(),
  sliding_window=3,
  global_layer_period=2,
  query_pre_attn_scalar=7.0,
  scale_embeddings=True,
)
UMT5 = dataclasses.replace(T5_1_1, relpos_per_layer=True)
T5GEMMA = dataclasses.replace(
  GEMMA3,
  num_encoder_layers=3,
  num_decoder_layers=2,
  num_kv_heads=2,
  qk_norm=False,
  rope_base=1e4,
  rope_local_base=None,
  attention_softcap=5.0,
  logits_softcap=3.0,
  decoder_embedding=True,
)
FAMILIES = {
  'opt': OPT,
  'pythia': PYTHIA,
  'llama': LLAMA,
  'mistral': MISTRAL,
  'olmo2': OLMO2,
  'smollm3': SMOLLM3,
  'qwen2': QWEN2,
  'qwen3': QWEN3,
  'gemma3': GEMMA3,
  'umt5': UMT5,
  't5gemma': T5GEMMA,
}
SLMS = {'t5_1_0': T5_1_0, 't5_1_1': T5_1_1, 'gpt2': GPT2}

LLM = dataclasses.replace(
  T5_1_1,
  emb_dim=24,
  num_heads=4,
  head_dim=6,
  mlp_dim=40,
  num_encoder_layers=3,
)


def llm_to_slm(
  slm: str,
  injection: str,
  vocabulary: str,
  llm: config_lib.TransformerConfig = LLM,
  **slm_changes: Any,
) -> l2s.LlmToSlm:
  """Returns a module whose LLM has more ids if the vocabulary is foreign."""
  shared = vocabulary == 'shared'
  return l2s.LlmToSlm(
    llm if shared else dataclasses.replace(llm, vocab_size=280),
    dataclasses.replace((SLMS | FAMILIES)[slm], **slm_changes),
    injection,
    shared,
  )


MODULES: dict[str, Module] = (
  {name: l2s.build(config) for name, config in (SLMS | FAMILIES).items()}
  | {
    'llm_to_gemma3-add-foreign': llm_to_slm(
      'gemma3',
      'add',
      'foreign',
      dataclasses.replace(T5GEMMA, emb_dim=24, num_kv_heads=3),
    ),
  }
  | {
    f'llm_to_{slm}-{injection}-{vocabulary}': llm_to_slm(
      slm, injection, vocabulary
    )
    for slm in SLMS
    for injection in l2s.INJECTIONS
    for vocabulary in ('shared', 'foreign')
  }
)


def pad_and_shift(
  prompt_ids: Sequence[Sequence[int]],
  answer_ids: Sequence[Sequence[int]],
  *,
  task_feature_lengths: Mapping[str, int],
  prompt_vocabulary: base.Vocabulary,
  answer_vocabulary: base.Vocabulary,
  batch_size: int | None = None,
) -> batching.Batch:
  """Returns a whole batch, the same as SeqIO's of the same ids.

  Args:
    prompt_ids: EOS included; beyond their length they are cut.
    answer_ids: one for each prompt, likewise.
    task_feature_lengths: `inputs` and `targets`, in tokens.
    prompt_vocabulary: for its pad id.
    answer_vocabulary: for its pad and start ids.
    batch_size: rows to fill up to; None: as many as there are prompts.
  """
  batch = packing.lay_out(
    [ids[: task_feature_lengths['inputs']] for ids in prompt_ids],
    [ids[: task_feature_lengths['targets']] for ids in answer_ids],
    range(len(prompt_ids)),
    task_feature_lengths=task_feature_lengths,
    prompt_pad_id=prompt_vocabulary.pad_id,
    answer_pad_id=answer_vocabulary.pad_id,
    start_id=answer_vocabulary.start_id,
  )
  return batching.pad_rows(batch, batch_size)


def streamed(provider: 'seqio.Task | seqio.Mixture') -> streams.StreamedTask:
  """Returns what `tasks.bind` has returned, as `bound_tasks.bind` does."""
  return streams.StreamedTask(provider, provider.name)


def eval_batches(
  task: 'seqio.Task | seqio.Mixture',
  *,
  task_feature_lengths: Mapping[str, int],
  batch_size: int,
  split: str = 'validation',
  num_examples: int | None = None,
) -> streams.TaskBatches:
  """Returns one pass over a split in its own order, task after task.

  Every example is there once, at its weight; the last batch is filled up.

  Args:
    task: from `tasks.bind`; of a mixture, the tasks that have the split.
    task_feature_lengths: `inputs` and `targets`, in tokens; longer is cut.
    batch_size: over all devices.
    split: `validation`, `test`, or another.
    num_examples: the first so many of each task; None: all.
  """
  from l2s_jax.data import features
  from l2s_jax.data.features import seqio, tf

  converter = features.make_converter(task)
  datasets = [
    converter(
      part.get_dataset(
        task_feature_lengths, split=split, shuffle=False, num_epochs=1
      ).take(-1 if num_examples is None else num_examples),
      task_feature_lengths,
    )
    for part in seqio.get_subtasks(task)
    if split in part.splits
  ]
  dataset = functools.reduce(lambda one, two: one.concatenate(two), datasets)
  dataset = dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE)
  return streams.TaskBatches(dataset.as_numpy_iterator(), batch_size)


# The others have each SLM with each injection and each kind of vocabulary, and
# each of these with the other.
_REPEATING = (
  'llm_to_t5_1_0-add-foreign',
  'llm_to_t5_1_0-replace-shared',
  'llm_to_t5_1_1-add-shared',
  'llm_to_t5_1_1-replace-foreign',
  'llm_to_gpt2-add-shared',
  'llm_to_gpt2-replace-foreign',
)


def cases(names: Iterable[str]) -> list[Any]:
  """Returns names of modules for pytest; those that repeat others are long."""
  return [
    pytest.param(name, marks=pytest.mark.long) if name in _REPEATING else name
    for name in names
  ]


def prompt_ids(module: Module) -> int:
  """Returns how many ids the module's prompts are drawn from."""
  if isinstance(module, l2s.LlmToSlm):
    return module.llm_config.vocab_size
  return module.config.vocab_size


@functools.cache
def param_shapes(module: Module) -> Any:
  """Returns the shapes of a module's parameters, for which it is traced."""
  shapes, _ = partitioning.abstract_params(
    functools.partial(module.init, deterministic=True),
    batch_keys.example_batch(1, 2, 2),
  )
  return shapes


def random_params(module: Module, seed: int = 0) -> dict[str, Any]:
  """Returns parameters of which none is a zero, a one, or too small to see."""
  generator = np.random.default_rng(seed)

  def draw(path, shape):
    name = path[-1].key
    if name == 'scale':
      return generator.uniform(0.5, 1.5, shape.shape).astype(np.float32)
    # 1/sqrt(16), the width of all these models, lets a layer speak up.
    stddev = 1.0 if 'embedding' in name else 0.25
    return generator.normal(0, stddev, shape.shape).astype(np.float32)

  return jax.tree.map(
    jnp.asarray, jax.tree_util.tree_map_with_path(draw, param_shapes(module))
  )


class Arrays:
  """A source of weights in memory."""

  location = 'memory'
  model_type: str | None = None

  def __init__(self, config, params):
    self.config = config
    self.special_ids = {}
    self.arrays = {
      path: np.asarray(array)
      for path, array in traverse_util.flatten_dict(params).items()
    }

  def step(self):
    return None

  def shapes(self):
    return {
      path: jax.ShapeDtypeStruct(array.shape, array.dtype)
      for path, array in self.arrays.items()
    }

  def read(self, path, layer=None):
    array = self.arrays[path]
    return array if layer is None else array[layer]

  def name(self, path):
    return '/'.join(path)

  def digest(self, path):
    shape = self.arrays[path].shape
    return source.digest(
      source.digest_layer(self.read(path, layer))
      for layer in source.layers(path, shape)
    )


def segments(lengths: Sequence[int], total: int) -> np.ndarray:
  return (np.arange(total) < np.asarray(lengths)[:, None]).astype(np.int32)


def random_batch(
  num_prompt_ids: int = 264,
  num_answer_ids: int = 264,
  *,
  prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
  answer_lengths: Sequence[int] = ANSWER_LENGTHS,
  seed: int = 0,
) -> dict[str, jax.Array]:
  """Returns ragged rows whose padding holds ids as random as the rest."""
  generator = np.random.default_rng(seed)
  prompt = (len(prompt_lengths), max(prompt_lengths))
  answer = (len(answer_lengths), max(answer_lengths))
  weights = segments(answer_lengths, answer[1])
  return {
    key: jnp.asarray(value)
    for key, value in {
      'encoder_input_tokens': generator.integers(
        num_prompt_ids, size=prompt, dtype=np.int32
      ),
      'encoder_segment_ids': segments(prompt_lengths, prompt[1]),
      'decoder_input_tokens': generator.integers(
        num_answer_ids, size=answer, dtype=np.int32
      ),
      'decoder_target_tokens': generator.integers(
        num_answer_ids, size=answer, dtype=np.int32
      ),
      'decoder_segment_ids': weights,
      'decoder_loss_weights': weights.astype(np.float32),
    }.items()
  }


def batch_for(module: Module, **options: Any) -> dict[str, jax.Array]:
  return random_batch(prompt_ids(module), **options)


@functools.partial(jax.jit, static_argnames='module')
def logits(module, params, batch):
  """Returns teacher-forced logits; equal modules compile once."""
  return module.apply({'params': params}, batch, deterministic=True)


@functools.partial(jax.jit, static_argnames=('module', 'num_slots'))
def prefill(module, params, batch, num_slots):
  """Returns the cache; takes parameters as training has them."""
  module = l2s.for_generation(module)
  return module.apply(
    {'params': l2s.params_for_generation(module, params)},
    batch,
    num_slots=num_slots,
    method='prefill',
  )


@functools.partial(jax.jit, static_argnames='module')
def extend(module, params, tokens, cache):
  """Returns logits and cache; takes parameters as training has them."""
  module = l2s.for_generation(module)
  writer, name = l2s.writer(module)
  params = l2s.params_for_generation(module, params)
  return writer.apply(
    {'params': l2s.writer_params(params, name)}, tokens, cache, method='extend'
  )


def generate(
  module, params, batch, *, max_decode_len, start_id=0, eos_id=-1, pad_id=0
):
  """Returns greedy tokens; takes parameters as training has them."""
  generator = generate_lib.Generator(
    module,
    max_decode_len=max_decode_len,
    ids=strategies.Ids(start_id, eos_id, pad_id),
  )
  return generator(generator.prepare(params), batch)


@functools.cache
def vocabulary() -> base.Vocabulary:
  """Returns GPT-2's first 256 ids: bytes, `!` being 0, and its EOS."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  ids = {piece: i for i, piece in enumerate([*alphabet, '<|endoftext|>'])}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    files.write_json(folder / 'vocab.json', ids)
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    return loading.load(str(folder))


def system(module: Module) -> system_lib.System:
  """Returns a system of a module, with a vocabulary that it has room for."""
  return system_lib.System(
    module=module,
    prompt_vocabulary=vocabulary(),
    answer_vocabulary=vocabulary(),
    frozen=('llm',) if isinstance(module, l2s.LlmToSlm) else (),
  )


def import_reference():
  """Returns torch and transformers, or skips where they are absent."""
  reason = 'parity with Hugging Face needs torch and transformers'
  return (
    pytest.importorskip('torch', reason=reason),
    pytest.importorskip('transformers', reason=reason),
  )


def assert_close(found, expected):
  """Compares float32 numbers, each by itself and by the largest."""
  atol = 1e-5 * np.abs(expected).max(initial=1.0)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)


def assert_trees_equal(a, b):
  """Compares paths, shapes and bits."""
  a, b = (
    {
      jax.tree_util.keystr(path): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (a, b)
  )
  assert a.keys() == b.keys()
  for name, leaf in a.items():
    np.testing.assert_array_equal(leaf, b[name], name)
