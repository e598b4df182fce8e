# SPDX-License-Identifier: Apache-2.0
"""Every family computes what the package transformers computes.

Random models in float32, written by `save_pretrained` and read by us: hidden
states, logits, and greedy tokens in padded batches of unequal lengths. Skipped
where torch or transformers are absent.
"""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from l2s_jax.models import l2s
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.weights import opening
from l2s_jax.weights import source as source_lib

NUM_TOKENS = 32
START_ID = 7
NUM_WORDS = 67

# heads * head_dim is not the width, no vocabulary is a multiple of 128, and no
# two sizes of a model are equal where its family lets them differ.
T5: dict[str, Any] = {
  'model_type': 't5',
  'vocab_size': NUM_WORDS,
  'd_model': 16,
  'num_heads': 4,
  'd_kv': 6,
  'd_ff': 20,
  'num_layers': 3,
  'num_decoder_layers': 2,
  'relative_attention_num_buckets': 8,
  'relative_attention_max_distance': 20,
}
T5_1_1 = T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}
GPT2: dict[str, Any] = {
  'model_type': 'gpt2',
  'vocab_size': NUM_WORDS,
  'n_embd': 20,
  'n_head': 4,
  'n_inner': 24,
  'n_layer': 2,
  'n_positions': 80,
}
OPT: dict[str, Any] = {
  'model_type': 'opt',
  'vocab_size': NUM_WORDS,
  'hidden_size': 20,
  'word_embed_proj_dim': 20,
  'num_attention_heads': 4,
  'ffn_dim': 24,
  'num_hidden_layers': 2,
  'max_position_embeddings': 70,
}
PYTHIA: dict[str, Any] = {
  'model_type': 'gpt_neox',
  'vocab_size': NUM_WORDS,
  'hidden_size': 24,
  'num_attention_heads': 3,
  'intermediate_size': 28,
  'num_hidden_layers': 2,
  'rotary_pct': 0.25,
  'rotary_emb_base': 300,
}
LLAMA: dict[str, Any] = {
  'model_type': 'llama',
  'vocab_size': NUM_WORDS,
  'hidden_size': 18,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'intermediate_size': 28,
  'num_hidden_layers': 3,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500.0,
}
LLAMA3_SCALING = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
QWEN2 = LLAMA | {
  'model_type': 'qwen2',
  'hidden_size': 24,
  'head_dim': 4,  # transformers has no say in it
  'tie_word_embeddings': True,
}
MISTRAL = LLAMA | {'model_type': 'mistral', 'sliding_window': 5}
QWEN2_WINDOWS = QWEN2 | {
  'use_sliding_window': True,
  'sliding_window': 5,
  'max_window_layers': 1,
}
OLMO2 = LLAMA | {'model_type': 'olmo2', 'num_key_value_heads': 3}
SMOLLM3 = LLAMA | {'model_type': 'smollm3', 'no_rope_layer_interval': 2}
QWEN3 = LLAMA | {'model_type': 'qwen3', 'num_key_value_heads': 3}
GEMMA2: dict[str, Any] = LLAMA | {
  'model_type': 'gemma2',
  'num_hidden_layers': 4,
  'rope_theta': 1e4,
  'sliding_window': 5,
  'query_pre_attn_scalar': 11,
  'attn_logit_softcapping': 2.0,
  'final_logit_softcapping': 3.0,
}
GEMMA3: dict[str, Any] = GEMMA2 | {
  'model_type': 'gemma3_text',
  'num_key_value_heads': 1,
  'num_hidden_layers': 7,
  'sliding_window_pattern': 3,
  'rope_theta': 1e6,
  'rope_local_base_freq': 100.0,
  'attn_logit_softcapping': None,
  'final_logit_softcapping': None,
}
T5GEMMA: dict[str, Any] = {
  'model_type': 't5gemma',
  'encoder': GEMMA2 | {'model_type': 't5_gemma_module'},
  'decoder': GEMMA2 | {'model_type': 't5_gemma_module', 'num_hidden_layers': 2},
}
# As in 9B-2B.
T5GEMMA_OF_TWO_SIZES = T5GEMMA | {
  'decoder': T5GEMMA['decoder']
  | {'hidden_size': 30, 'intermediate_size': 22, 'num_key_value_heads': 3}
}
YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'beta_fast': 8.0,
  'original_max_position_embeddings': 24,
}

ENCODER_DECODERS = {
  't5': T5,
  't5-gated': T5 | {'feed_forward_proj': 'gated-silu'},
  't5_1_1': T5_1_1,
  'mt5': T5_1_1 | {'model_type': 'mt5'},
  'umt5': T5_1_1 | {'model_type': 'umt5'},
  't5gemma': T5GEMMA,
}
ENCODERS = ENCODER_DECODERS | {'t5gemma-two-sizes': T5GEMMA_OF_TWO_SIZES}
DECODERS = {
  'gpt2': GPT2,
  'gpt2-untied': GPT2 | {'tie_word_embeddings': False},
  'gpt2-unscaled': GPT2 | {'scale_attn_weights': False},
  'opt': OPT,
  'opt-untied': OPT | {'tie_word_embeddings': False},
  'pythia': PYTHIA,
  'pythia-in-turn': PYTHIA | {'use_parallel_residual': False, 'rotary_pct': 1},
  'llama': LLAMA,
  'llama-tied': LLAMA | {'tie_word_embeddings': True, 'attention_bias': True},
  'llama-biases': LLAMA | {'attention_bias': True, 'mlp_bias': True},
  'llama3': LLAMA | {'rope_scaling': LLAMA3_SCALING},
  'llama-linear': LLAMA
  | {'rope_scaling': {'rope_type': 'linear', 'factor': 3.0}},
  'mistral': MISTRAL,
  'mistral-without-window': MISTRAL | {'sliding_window': None},
  'mistral-default-head': MISTRAL | {'hidden_size': 24, 'head_dim': None},
  'olmo2': OLMO2,
  'olmo2-grouped': LLAMA | {'model_type': 'olmo2'},
  'smollm3': SMOLLM3,
  'smollm3-rotary': SMOLLM3 | {'no_rope_layers': [1, 1, 1]},
  'qwen2': QWEN2,
  'qwen2-windows': QWEN2_WINDOWS,
  'qwen2-yarn': QWEN2 | {'rope_scaling': YARN},
  'pythia-yarn': PYTHIA
  | {'rotary_pct': 0.75, 'rope_scaling': YARN | {'attention_factor': 1.3}},
  'qwen3': QWEN3,
  'qwen3-windows': QWEN3 | QWEN2_WINDOWS | QWEN3,
  'gemma2': GEMMA2,
  'gemma3': GEMMA3,
  # From 4B on.
  'gemma3-linear': GEMMA3
  | {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}},
}


def save_pretrained(folder, config_json, model_class, **options):
  """Returns a random model of transformers, after saving it."""
  torch, transformers = helpers.import_reference()
  torch.manual_seed(0)
  special_ids = {
    'decoder_start_token_id': START_ID,
    'bos_token_id': START_ID,
    'eos_token_id': None,
    'pad_token_id': 0,
  }
  config_json = {
    key: value | special_ids if isinstance(value, dict) else value
    for key, value in (config_json | special_ids).items()
  }
  config = transformers.AutoConfig.for_model(
    **config_json,
    attn_implementation='eager',  # fused, 4.57 forgets scale_attn_weights
  )
  model_class = getattr(transformers, model_class)
  make = getattr(model_class, 'from_config', model_class)  # of an auto class
  model = make(config).eval()
  if config_json.get('tie_word_embeddings') is False:
    # transformers 5 ties those of T5's kind, whatever config.json says.
    if head := getattr(model, 'lm_head', None):
      head.weight = torch.nn.Parameter(head.weight.clone())
  with torch.no_grad():
    # Layers louder than embeddings, lest greedy tokens repeat from the first
    # on; those of T5, whose attention is not scaled, less so, nor those with
    # biases everywhere: float32 itself would be 1e-5 off there.
    is_loud = config_json['model_type'] not in ('t5', 'mt5', 'umt5')
    gain = 2 if is_loud and not config_json.get('mlp_bias') else 1
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape)
      if parameter.ndim == 1:
        parameter.add_(0.2 * noise)
      else:
        is_table = len(parameter) == NUM_WORDS
        noise *= parameter.shape[1] ** -0.5
        parameter.copy_(noise * (0.5 if is_table else gain))
  model.save_pretrained(folder, **options)
  return torch, model


def load_model(folder):
  source = opening.open_source(str(folder))
  return l2s.build(source.config), load(
    source, shapes_lib.of_model(source.config)
  )


def load_encoder(folder):
  """Returns what LLM-to-SLM keeps of an LLM."""
  source = opening.open_source(str(folder))
  shapes = {
    path: shape
    for path, shape in shapes_lib.of_model(source.config).items()
    if path[0] in ('token_embedder', 'encoder')
  }
  return l2s.build_reader(source.config), load(source, shapes)


def load(source, shapes):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return source_lib.load(
    source,
    traverse_util.unflatten_dict(dict(shapes)),
    traverse_util.unflatten_dict(dict.fromkeys(shapes, device)),
  )[0]


def make_batch(seed=0):
  """Returns a batch whose rows are padded on the right to unequal lengths."""
  rng = np.random.default_rng(seed)
  batch: dict[str, np.ndarray] = {}
  for side, lengths in (('encoder', (30, 1, 12)), ('decoder', (9, 6, 3))):
    tokens = rng.integers(2, 64, (3, max(lengths)))
    if side == 'decoder':
      tokens[:, 0] = START_ID
    batch[f'{side}_input_tokens'] = tokens.astype(np.int32)
    batch[f'{side}_segment_ids'] = helpers.segments(lengths, max(lengths))
  return batch


def encode(model, params, batch):
  def fn(model, batch):
    embeddings = model.embed(batch['encoder_input_tokens'])
    segment_ids = batch['encoder_segment_ids']
    return model.encode(embeddings, segment_ids, deterministic=True)

  batch = jax.tree.map(jnp.asarray, batch)
  return np.asarray(model.apply({'params': params}, batch, method=fn))


def compute_logits(model, params, batch):
  return np.asarray(
    helpers.logits(model, params, jax.tree.map(jnp.asarray, batch))
  )


def generate(model, params, batch):
  tokens = helpers.generate(
    model,
    params,
    jax.tree.map(jnp.asarray, batch),
    max_decode_len=NUM_TOKENS,
    start_id=START_ID,
  )
  return np.asarray(tokens)


def assert_close(ours, theirs):
  """Compares to 1e-5 of the largest number; float32 gives about 1e-6."""
  theirs = np.asarray(theirs)
  np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize('name', ENCODER_DECODERS)
def test_an_encoder_decoder_computes_what_transformers_computes(tmp_path, name):
  config_json = ENCODER_DECODERS[name]
  torch, theirs = save_pretrained(
    tmp_path,
    config_json,
    'AutoModelForSeq2SeqLM',
    max_shard_size='10KB' if name == 't5_1_1' else '1GB',
  )
  if name == 't5gemma':
    # transformers 5 lets an encoder see one token more on both sides than
    # earlier ones and google-deepmind/gemma, where T5Gemma is from.
    theirs.model.encoder.config.sliding_window -= 1
  batch = make_batch()
  prompt = {
    'input_ids': torch.tensor(batch['encoder_input_tokens']).long(),
    'attention_mask': torch.tensor(batch['encoder_segment_ids']),
  }
  with torch.no_grad():
    expected = theirs(
      **prompt,
      decoder_input_ids=torch.tensor(batch['decoder_input_tokens']).long(),
    )
    expected_tokens = theirs.generate(
      **prompt, do_sample=False, num_beams=1, max_new_tokens=NUM_TOKENS
    )[:, 1:]  # without the start token
  expected_logits = expected.logits
  if name == 'umt5':
    # transformers 5 scales logits as if umT5 were tied, which it is not.
    expected_logits *= config_json['d_model'] ** 0.5

  model, params = load_model(tmp_path)
  real = batch['encoder_segment_ids'] > 0
  encoded = encode(model, params, batch)
  assert_close(encoded[real], expected.encoder_last_hidden_state[real])
  real = batch['decoder_segment_ids'] > 0
  logits = compute_logits(model, params, batch)
  assert_close(logits[real], expected_logits[real])
  tokens = generate(model, params, batch)
  np.testing.assert_array_equal(tokens, expected_tokens)
  assert len(np.unique(tokens)) > 3


@pytest.mark.parametrize('name', DECODERS)
def test_a_decoder_computes_what_transformers_computes(tmp_path, name):
  """Each row of ours, padded inside the batch, is theirs alone, unpadded."""
  torch, theirs = save_pretrained(
    tmp_path, DECODERS[name], 'AutoModelForCausalLM'
  )
  batch = make_batch()
  model, params = load_model(tmp_path)
  encoded = encode(model, params, batch)
  logits = compute_logits(model, params, batch)
  tokens = generate(model, params, batch)
  assert len(np.unique(tokens)) > 3

  for row in range(3):
    prompt, answer = (
      batch[f'{side}_input_tokens'][row][batch[f'{side}_segment_ids'][row] > 0]
      for side in ('encoder', 'decoder')
    )
    n = len(prompt)
    whole = torch.tensor(np.concatenate([prompt, answer]))[None].long()
    with torch.no_grad():
      expected = theirs(whole, output_hidden_states=True)
      written = theirs.generate(
        whole[:, : n + 1],
        do_sample=False,
        num_beams=1,
        max_new_tokens=NUM_TOKENS,
      )[0, n + 1 :]
    assert_close(encoded[row, :n], expected.hidden_states[-1][0, :n])
    assert_close(logits[row, : len(answer)], expected.logits[0, n:])
    np.testing.assert_array_equal(tokens[row], written)


@pytest.mark.parametrize(
  'name', ['mistral', 'olmo2', 'smollm3', 'qwen2-windows', 'gemma2']
)
def test_padding_on_the_left_leaves_windows_where_they_were(tmp_path, name):
  """Of theirs, whose windows count slots; prompts exceed the window."""
  torch, theirs = save_pretrained(
    tmp_path, DECODERS[name], 'AutoModelForCausalLM'
  )
  batch = make_batch()
  model, params = load_model(tmp_path)
  logits, tokens = (f(model, params, batch) for f in (compute_logits, generate))
  mask = torch.tensor(batch['encoder_segment_ids'])
  order = mask.argsort(dim=1, stable=True)
  prompt = torch.tensor(batch['encoder_input_tokens']).long().gather(1, order)
  mask = mask.gather(1, order)
  answer = torch.tensor(batch['decoder_input_tokens']).long()
  with torch.no_grad():
    whole = torch.cat([prompt, answer], 1)
    whole_mask = torch.cat([mask, torch.ones_like(answer).to(mask)], 1)
    expected = theirs(
      whole,
      attention_mask=whole_mask,
      position_ids=(whole_mask.cumsum(1) - 1).clamp(min=0),
    ).logits[:, prompt.shape[1] :]
    n = prompt.shape[1] + 1
    written = theirs.generate(
      whole[:, :n],
      attention_mask=whole_mask[:, :n],
      do_sample=False,
      num_beams=1,
      max_new_tokens=NUM_TOKENS,
    )[:, n:]
  real = batch['decoder_segment_ids'] > 0
  assert_close(logits[real], expected[real])
  np.testing.assert_array_equal(tokens, written)


@pytest.mark.parametrize(
  'name, architecture',
  [
    ('t5_1_1', 'T5EncoderModel'),
    ('umt5', 'UMT5EncoderModel'),
    ('t5gemma', 'T5GemmaEncoderModel'),
    ('t5gemma-two-sizes', 'T5GemmaForConditionalGeneration'),
  ],
)
def test_an_encoder_alone_computes_what_transformers_computes(
  tmp_path, name, architecture
):
  """All that LLM-to-SLM needs of an LLM."""
  torch, theirs = save_pretrained(
    tmp_path,
    ENCODERS[name] | {'is_encoder_decoder': name != 't5gemma'},
    architecture,
  )
  theirs = getattr(theirs, 'model', theirs)
  if name.startswith('t5gemma'):
    theirs.encoder.config.sliding_window -= 1  # as above
  batch = make_batch()
  with torch.no_grad():
    expected = theirs.encoder(
      torch.tensor(batch['encoder_input_tokens']).long(),
      torch.tensor(batch['encoder_segment_ids']),
    ).last_hidden_state

  model, params = load_encoder(tmp_path)
  encoded = encode(model, params, batch)
  real = batch['encoder_segment_ids'] > 0
  assert_close(encoded[real], expected[real])
