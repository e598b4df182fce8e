# SPDX-License-Identifier: Apache-2.0
"""LLM-to-SLM for the package transformers (5 or newer) and PyTorch.

The LLM encodes the prompt once, a projector maps its hidden states to the width
of the SLM, and the SLM generates the answer (arXiv:2402.16844). LLM and SLM are
classes of transformers, composed by this file. The only imports are
transformers and torch, so that the folder needs no other package.

Prompts may be padded on either side. Internally padding is moved to the left,
so that the answer follows its prompt directly.
"""

import copy
import inspect

import torch
import transformers
from transformers import masking_utils, modeling_outputs
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

# Families that multiply `inputs_embeds` by sqrt(hidden_size) in the model,
# unless their embedding layer does.
_SCALED_INPUTS = ('gemma', 'gemma2', 't5gemma')
_FINAL_NORMS = ('final_layer_norm', 'norm', 'ln_f')
# Families that share embeddings between encoder and decoder for any value of
# tie_word_embeddings.
_T5 = ('t5', 'mt5', 'umt5')
_MIX = 'mix'


class LlmToSlmConfig(transformers.PretrainedConfig):
  """The configs of an LLM and an SLM, and of their connection.

  Attributes:
    llm: config of the LLM, or of its encoder.
    slm: config of the SLM.
    slm_is_tied: whether the SLM's output head shares its embedding table.
    injection: 'add' adds the projected states to the SLM's embeddings of the
      prompt, 'replace' replaces the embeddings.
    shared_vocabulary: whether the SLM has the LLM's vocabulary. If not, 'add'
      projects the LLM's embeddings of the prompt with `prompt_embedder`.
    llm_layer: None for the LLM's last hidden states, a number for those after
      this many layers, 'mix' for a learned mix of all layers.
    llm_prefix_ids: token ids that the LLM reads before each prompt; their
      hidden states are dropped.
  """

  model_type = 'llm_to_slm'
  sub_configs = {
    'llm': transformers.AutoConfig,
    'slm': transformers.AutoConfig,
  }

  def __init__(
    self,
    llm=None,
    slm=None,
    slm_is_tied=True,
    injection='add',
    shared_vocabulary=True,
    llm_layer=None,
    llm_prefix_ids=(),
    **kwargs,
  ):
    kwargs.setdefault('is_encoder_decoder', True)
    kwargs['tie_word_embeddings'] = False  # LLM and SLM have their own.
    self.llm, self.slm = _config(llm), _config(slm)
    self.slm_is_tied = slm_is_tied
    if self.slm.model_type not in _T5:
      self.slm.tie_word_embeddings = slm_is_tied
    self.injection = injection
    self.shared_vocabulary = shared_vocabulary
    self.llm_layer = llm_layer
    self.llm_prefix_ids = list(llm_prefix_ids)
    decoder = self.slm.get_text_config(decoder=True)
    self.vocab_size = decoder.vocab_size
    self.hidden_size = decoder.hidden_size
    super().__init__(**kwargs)

  def get_text_config(self, decoder=None, encoder=None):
    """Returns the SLM's config for `decoder`, the LLM's for `encoder`."""
    if decoder and not encoder:
      return self.slm.get_text_config(decoder=True)
    if encoder and not decoder:
      return self.llm.get_text_config(encoder=True)
    return self


def _config(values):
  """Returns a config from a dict with `model_type`; None means a default T5."""
  if isinstance(values, transformers.PretrainedConfig):
    return values
  values = dict(values or {'model_type': 't5'})
  return transformers.AutoConfig.for_model(values.pop('model_type'), **values)


def _is_encoder(config):
  """Returns whether the LLM is an encoder, which takes no position_ids."""
  return config.model_type in (*_T5, 't5gemma')


def _make_llm(config):
  """Returns the LLM without a head; of an encoder-decoder, the encoder only."""
  if not _is_encoder(config):
    return transformers.AutoModel.from_config(config)
  name = type(config).__name__.removesuffix('Config')
  return getattr(transformers, f'{name}EncoderModel')(config)


def _input_scale(model):
  """Returns the factor by which a model multiplies its `inputs_embeds`."""
  config = model.config
  if config.model_type not in _SCALED_INPUTS:
    return 1.0
  if type(model.get_input_embeddings()) is not torch.nn.Embedding:
    return 1.0
  return getattr(config, 'encoder', config).hidden_size ** 0.5


def _narrow_window(encoder):
  """Sets the sliding window of a T5Gemma encoder to that of Gemma's own code.

  transformers 5 includes one token more on each side.
  """
  overlay = masking_utils.sliding_window_bidirectional_overlay(1)
  if overlay(0, 0, 0, 1):
    encoder.config = copy.deepcopy(encoder.config)
    encoder.config.sliding_window -= 1


def _positions(mask):
  """Returns position ids, [batch, length], that do not count padding."""
  return (mask.cumsum(1) - 1).clamp(min=0)


class _LayerMix(torch.nn.Module):
  """A mix of layers' hidden states with softmax weights and one scale."""

  def __init__(self, num_layers):
    super().__init__()
    self.weights = torch.nn.Parameter(torch.zeros(num_layers))
    self.scale = torch.nn.Parameter(torch.ones(1))

  def forward(self, states):
    shares = self.scale * torch.softmax(self.weights, 0)
    return sum(
      share * x for share, x in zip(shares.to(states[0]), states, strict=True)
    )


class LlmToSlmForConditionalGeneration(
  transformers.PreTrainedModel, transformers.GenerationMixin
):
  """An LLM, a projector and an SLM, with the interface of an encoder-decoder.

  Its encoder ends with the SLM's encoder. For a decoder-only SLM it ends with
  the prompt embeddings, which the SLM reads before the answer.
  """

  config_class = LlmToSlmConfig
  main_input_name = 'input_ids'
  _supports_sdpa = True
  _supports_flash_attn = True

  def __init__(self, config):
    super().__init__(config)
    self.llm = _make_llm(config.llm)
    self.slm = (
      transformers.AutoModelForSeq2SeqLM
      if config.slm.is_encoder_decoder
      else transformers.AutoModelForCausalLM
    ).from_config(config.slm)
    if config.slm.model_type in _T5 and not config.slm_is_tied:
      self.slm._tied_weights_keys = {
        name: table
        for name, table in self.slm._tied_weights_keys.items()
        if not name.startswith('lm_head')
      }
      self.slm.all_tied_weights_keys = self.slm.get_expanded_tied_weights_keys()
    llm_width = self.llm.get_input_embeddings().embedding_dim
    width = self.slm.get_input_embeddings().embedding_dim
    self.projector = torch.nn.Sequential(
      torch.nn.Linear(llm_width, width),
      torch.nn.ReLU(),
      torch.nn.Linear(width, width),
    )
    if config.injection == 'add' and not config.shared_vocabulary:
      self.prompt_embedder = torch.nn.Linear(llm_width, width)
    if config.llm_layer == _MIX:
      llm = config.llm.get_text_config(encoder=True)
      llm = getattr(llm, 'encoder', llm)
      self.layer_mix = _LayerMix(llm.num_hidden_layers + 1)
    for model in (self.llm, self.slm):
      if model.config.model_type == 't5gemma':
        _narrow_window(model.get_encoder())
    self.post_init()

  def get_input_embeddings(self):
    return self.slm.get_input_embeddings()

  def get_output_embeddings(self):
    return self.slm.get_output_embeddings()

  def get_encoder(self, modality=None):
    return _Encoder(self)

  def get_decoder(self):
    return self.slm.get_decoder()

  def encode(
    self,
    input_ids=None,
    attention_mask=None,
    output_attentions=None,
    output_hidden_states=None,
    return_dict=True,
  ):
    """Returns the encoder output, with padding moved to the left.

    Args:
      input_ids: token ids of the prompts, [batch, length].
      attention_mask: 1 for tokens, 0 for padding, [batch, length]; None means
        no padding.
      output_attentions: ignored; `generate` passes it.
      output_hidden_states: ignored.
      return_dict: ignored.

    Returns:
      A BaseModelOutput: `last_hidden_state` is [batch, length, hidden_size].
    """
    del output_attentions, output_hidden_states, return_dict
    if attention_mask is None:
      attention_mask = torch.ones_like(input_ids)
    order = attention_mask.argsort(dim=1, stable=True)
    input_ids, mask = (x.gather(1, order) for x in (input_ids, attention_mask))
    projected = self.projector(self._read(input_ids, mask))
    projected = torch.where(mask[..., None] > 0, projected, 0)
    scale = _input_scale(self.slm)
    embeddings = projected / scale
    if self.config.injection == 'add':
      embeddings = embeddings + self._embed(input_ids, scale)
    if self.config.slm.is_encoder_decoder:
      embeddings = self.slm.get_encoder()(
        inputs_embeds=embeddings, attention_mask=mask
      ).last_hidden_state
      embeddings = torch.where(mask[..., None] > 0, embeddings, 0)
    return modeling_outputs.BaseModelOutput(last_hidden_state=embeddings)

  def _embed(self, input_ids, scale):
    """Returns the SLM's prompt embeddings, before the SLM scales them."""
    if self.config.shared_vocabulary:
      return self.slm.get_input_embeddings()(input_ids)
    embeddings = self.llm.get_input_embeddings()(input_ids)
    embeddings = embeddings * _input_scale(self.llm)
    return self.prompt_embedder(embeddings) / scale

  def _read(self, input_ids, mask):
    """Returns the LLM's hidden states of prompts, without `llm_prefix_ids`."""
    prefix = input_ids.new_tensor(self.config.llm_prefix_ids)
    prefix = prefix.expand(input_ids.shape[0], -1)
    input_ids = torch.cat([prefix, input_ids], dim=1)
    mask = torch.cat([torch.ones_like(prefix).to(mask), mask], dim=1)
    order = mask.argsort(dim=1, stable=True)  # Padding before the prefix.
    input_ids, mask = (x.gather(1, order) for x in (input_ids, mask))
    inputs = {'input_ids': input_ids, 'attention_mask': mask}
    if not _is_encoder(self.config.llm):
      inputs |= {'position_ids': _positions(mask), 'use_cache': False}
    return self._states(inputs)[:, prefix.shape[1] :]

  def _states(self, inputs):
    """Returns the hidden states after `llm_layer`, or the mix of all layers."""
    layer = self.config.llm_layer
    if layer is None:
      return self.llm(**inputs).last_hidden_state
    states = self.llm(**inputs, output_hidden_states=True).hidden_states
    norm = self._final_norm()
    if layer != _MIX:
      return norm(states[layer])
    return self.layer_mix([*(norm(x) for x in states[:-1]), states[-1]])

  def _final_norm(self):
    """Returns the norm after the LLM's last layer."""
    stack = self.llm
    for name in ('encoder', 'decoder'):
      stack = getattr(stack, name, stack)
    return next(
      getattr(stack, name) for name in _FINAL_NORMS if hasattr(stack, name)
    )

  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    decoder_input_ids=None,
    decoder_attention_mask=None,
    encoder_outputs=None,
    past_key_values=None,
    labels=None,
    use_cache=None,
    return_dict=None,
    **kwargs,
  ):
    """Returns the logits of answers and, with `labels`, the cross-entropy.

    Args:
      input_ids: token ids of the prompts, [batch, prompt].
      attention_mask: 1 for tokens, 0 for padding, [batch, prompt]; None means
        no padding.
      decoder_input_ids: token ids of the answers after the start token,
        inclusive, [batch, answer].
      decoder_attention_mask: mask of all answer tokens, including those in the
        cache.
      encoder_outputs: output of `encode`, in place of `input_ids`.
      past_key_values: an EncoderDecoderCache.
      labels: token ids of the answers, -100 to ignore a position.
      use_cache: whether to return the cache.
      return_dict: False returns a tuple.
      **kwargs: ignored arguments of `generate`.

    Returns:
      A Seq2SeqLMOutput: `logits` are [batch, answer, vocab_size], `loss` is in
      nats per label.
    """
    if encoder_outputs is None:
      encoder_outputs = self.encode(input_ids, attention_mask)
    prompt = encoder_outputs[0]
    mask = (
      torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
      if attention_mask is None
      else attention_mask.sort(dim=1, stable=True).values
    )
    if labels is not None and decoder_input_ids is None:
      decoder_input_ids = self._shift_right(labels)
    if self.config.slm.is_encoder_decoder:
      outputs = self.slm(
        encoder_outputs=modeling_outputs.BaseModelOutput(prompt),
        attention_mask=mask,
        decoder_input_ids=decoder_input_ids,
        decoder_attention_mask=decoder_attention_mask,
        past_key_values=past_key_values,
        use_cache=use_cache,
        return_dict=True,
      )
      logits, past_key_values = outputs.logits, outputs.past_key_values
      if self._is_scaled_as_if_tied():
        logits = logits * self.slm.config.d_model**0.5
    else:
      logits, past_key_values = self._continue(
        prompt,
        mask,
        decoder_input_ids,
        decoder_attention_mask,
        past_key_values,
        use_cache,
      )
    loss = None
    if labels is not None:
      loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.to(logits.device).flatten()
      )
    outputs = modeling_outputs.Seq2SeqLMOutput(
      loss=loss,
      logits=logits,
      past_key_values=past_key_values,
      encoder_last_hidden_state=prompt,
    )
    return outputs.to_tuple() if return_dict is False else outputs

  def _is_scaled_as_if_tied(self):
    """Returns whether transformers scales the logits of an untied umT5."""
    config = self.slm.config
    return (
      config.model_type == 'umt5'
      and config.tie_word_embeddings
      and not self.config.slm_is_tied
    )

  def _continue(
    self, prompt, mask, tokens, decoder_mask, past_key_values, use_cache
  ):
    """Returns the logits and the cache of a decoder-only SLM."""
    cache = past_key_values
    if isinstance(cache, EncoderDecoderCache):
      cache = cache.self_attention_cache
    num_past = 0 if cache is None else cache.get_seq_length()
    embeddings = self.slm.get_input_embeddings()(tokens)
    if num_past == 0:
      embeddings = torch.cat([prompt, embeddings.to(prompt)], dim=1)
    num_new = embeddings.shape[1]
    if decoder_mask is None:
      length = num_past + num_new - mask.shape[1]
      decoder_mask = mask.new_ones((mask.shape[0], length))
    mask = torch.cat([mask, decoder_mask.to(mask)], dim=1)
    outputs = self.slm(
      inputs_embeds=embeddings,
      attention_mask=mask,
      position_ids=_positions(mask)[:, -num_new:],
      past_key_values=cache,
      use_cache=use_cache,
      return_dict=True,
    )
    if past_key_values is None and outputs.past_key_values is not None:
      past_key_values = EncoderDecoderCache(
        outputs.past_key_values, DynamicCache()
      )
    return outputs.logits[:, -tokens.shape[1] :], past_key_values

  def _prepare_cache_for_generation(self, *args, **kwargs):
    """Sets a cross-attention cache without a sliding window."""
    super()._prepare_cache_for_generation(*args, **kwargs)
    # Cross-attention has no sliding window: its cache keeps the whole prompt.
    signature = inspect.signature(super()._prepare_cache_for_generation)
    model_kwargs = signature.bind(*args, **kwargs).arguments['model_kwargs']
    cache = model_kwargs.get('past_key_values')
    if isinstance(cache, EncoderDecoderCache) and not cache.is_updated.get(0):
      cache.cross_attention_cache = DynamicCache()

  def _shift_right(self, labels):
    """Returns decoder inputs: the start token, then all labels but the last."""
    start = labels.new_full(
      (labels.shape[0], 1), self.generation_config.decoder_start_token_id
    )
    tokens = torch.cat([start, labels[:, :-1]], dim=1)
    return tokens.masked_fill(
      tokens == -100, self.generation_config.pad_token_id
    )

  def prepare_decoder_input_ids_from_labels(self, labels):
    """Returns the decoder inputs for `labels`; data collators call it."""
    return self._shift_right(labels)


class _Encoder:
  """The encoder that `generate` calls before the first token."""

  def __init__(self, model):
    self.forward = model.encode

  def __call__(self, *args, **kwargs):
    return self.forward(*args, **kwargs)
