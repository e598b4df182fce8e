# SPDX-License-Identifier: Apache-2.0
"""LLM-to-SLM for the package transformers (5 or newer) and PyTorch.

The LLM reads the prompt once, a projector takes its states to the width of the
SLM, and the SLM writes the answer (arXiv:2402.16844). LLM and SLM are the
classes of transformers; this file composes them. It imports transformers and
torch alone, so that a folder with it needs nothing else.

Prompts may be padded on either side. Inside, padding is moved to the left, so
that an answer stands right behind its prompt.
"""

import copy
import inspect

import torch
import transformers
from transformers import masking_utils, modeling_outputs
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

# Their model multiplies `inputs_embeds` by sqrt(hidden_size), unless their
# table of embeddings does.
_SCALED_INPUTS = ('gemma', 'gemma2', 't5gemma')
_FINAL_NORMS = ('final_layer_norm', 'norm', 'ln_f')
# Whatever their config says, encoder and decoder share a table of embeddings.
_T5 = ('t5', 'mt5', 'umt5')
_MIX = 'mix'


class LlmToSlmConfig(transformers.PretrainedConfig):
  """The config of an LLM, of an SLM, and of what is between them.

  Attributes:
    llm: of the LLM, or of that part of it that reads prompts.
    slm: of the SLM.
    slm_is_tied: whether the SLM's output head is its table of embeddings.
    injection: 'add' projected states to the SLM's embeddings of the prompt, or
      'replace' them.
    shared_vocabulary: whether a prompt's ids are the SLM's own. If not, 'add'
      takes the LLM's embeddings through `prompt_embedder`.
    llm_layer: None for the LLM's last states, a number for those after so many
      layers, 'mix' for a mix of all layers.
    llm_prefix_ids: that the LLM reads in front of each prompt; their own states
      are left out.
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
    kwargs['tie_word_embeddings'] = False  # Each part says so of itself.
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
    if decoder and not encoder:
      return self.slm.get_text_config(decoder=True)
    if encoder and not decoder:
      return self.llm.get_text_config(encoder=True)
    return self


def _config(values):
  if isinstance(values, transformers.PretrainedConfig):
    return values
  values = dict(values or {'model_type': 't5'})
  return transformers.AutoConfig.for_model(values.pop('model_type'), **values)


def _is_encoder(config):
  """Whether an LLM is an encoder, which has no positions to be told."""
  return config.model_type in (*_T5, 't5gemma')


def _make_llm(config):
  if not _is_encoder(config):
    return transformers.AutoModel.from_config(config)
  name = type(config).__name__.removesuffix('Config')
  return getattr(transformers, f'{name}EncoderModel')(config)


def _input_scale(model):
  """Returns by what a model multiplies the embeddings that it is given."""
  config = model.config
  if config.model_type not in _SCALED_INPUTS:
    return 1.0
  if type(model.get_input_embeddings()) is not torch.nn.Embedding:
    return 1.0
  return getattr(config, 'encoder', config).hidden_size ** 0.5


def _narrow_window(encoder):
  """Lets the layers of a T5Gemma encoder see as far as Gemma's own do.

  transformers 5 counts one token more on each side.
  """
  overlay = masking_utils.sliding_window_bidirectional_overlay(1)
  if overlay(0, 0, 0, 1):
    encoder.config = copy.deepcopy(encoder.config)
    encoder.config.sliding_window -= 1


def _positions(mask):
  return (mask.cumsum(1) - 1).clamp(min=0)


class _LayerMix(torch.nn.Module):
  """A mix of layers' states: softmax weights, one a layer, and a scale."""

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
  """An LLM, a projector and an SLM, used as an encoder-decoder is.

  What stands for its encoder ends with the SLM's encoder or, where the SLM has
  none, with the embeddings of the prompt that its decoder reads first.
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
    """Returns what the SLM's decoder reads of prompts, padded on the left.

    Args:
      input_ids: of the prompts, [batch, length].
      attention_mask: 1 for tokens, 0 for padding; None where there is none.
      output_attentions: for `generate`; nothing is returned of them.
      output_hidden_states: likewise.
      return_dict: likewise.
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
    """Returns the SLM's embeddings of prompts, before its model scales them."""
    if self.config.shared_vocabulary:
      return self.slm.get_input_embeddings()(input_ids)
    embeddings = self.llm.get_input_embeddings()(input_ids)
    embeddings = embeddings * _input_scale(self.llm)
    return self.prompt_embedder(embeddings) / scale

  def _read(self, input_ids, mask):
    """Returns the LLM's states of prompts."""
    prefix = input_ids.new_tensor(self.config.llm_prefix_ids)
    prefix = prefix.expand(input_ids.shape[0], -1)
    input_ids = torch.cat([prefix, input_ids], dim=1)
    mask = torch.cat([torch.ones_like(prefix).to(mask), mask], dim=1)
    order = mask.argsort(dim=1, stable=True)  # Again padding goes to the left.
    input_ids, mask = (x.gather(1, order) for x in (input_ids, mask))
    inputs = {'input_ids': input_ids, 'attention_mask': mask}
    if not _is_encoder(self.config.llm):
      inputs |= {'position_ids': _positions(mask), 'use_cache': False}
    return self._states(inputs)[:, prefix.shape[1] :]

  def _states(self, inputs):
    """Returns the states after the layer that is read, or their mix."""
    layer = self.config.llm_layer
    if layer is None:
      return self.llm(**inputs).last_hidden_state
    states = self.llm(**inputs, output_hidden_states=True).hidden_states
    norm = self._final_norm()
    if layer != _MIX:
      return norm(states[layer])
    return self.layer_mix([*(norm(x) for x in states[:-1]), states[-1]])

  def _final_norm(self):
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
    """Returns logits of the answer, and with `labels` their cross-entropy.

    Args:
      input_ids: of the prompts.
      attention_mask: of the prompts; None where they have no padding.
      decoder_input_ids: of the answers, behind the start token.
      decoder_attention_mask: of the answers, those in the cache included.
      encoder_outputs: what `encode` has returned, in place of `input_ids`.
      past_key_values: an EncoderDecoderCache.
      labels: of the answers, -100 where there is none.
      use_cache: whether to return the cache.
      return_dict: whether to return names with the values.
      **kwargs: what `generate` tells other models.
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
    """Whether the SLM is a umT5 whose head is not the table of embeddings."""
    config = self.slm.config
    return (
      config.model_type == 'umt5'
      and config.tie_word_embeddings
      and not self.config.slm_is_tied
    )

  def _continue(
    self, prompt, mask, tokens, decoder_mask, past_key_values, use_cache
  ):
    """Returns logits of a decoder-only SLM, and its cache."""
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
    super()._prepare_cache_for_generation(*args, **kwargs)
    # Layers with a window see all of the prompt: their window is the answer's.
    signature = inspect.signature(super()._prepare_cache_for_generation)
    model_kwargs = signature.bind(*args, **kwargs).arguments['model_kwargs']
    cache = model_kwargs.get('past_key_values')
    if isinstance(cache, EncoderDecoderCache) and not cache.is_updated.get(0):
      cache.cross_attention_cache = DynamicCache()

  def _shift_right(self, labels):
    start = labels.new_full(
      (labels.shape[0], 1), self.generation_config.decoder_start_token_id
    )
    tokens = torch.cat([start, labels[:, :-1]], dim=1)
    return tokens.masked_fill(
      tokens == -100, self.generation_config.pad_token_id
    )

  def prepare_decoder_input_ids_from_labels(self, labels):
    return self._shift_right(labels)


class _Encoder:
  """What `generate` calls before the first token."""

  def __init__(self, model):
    self.forward = model.encode

  def __call__(self, *args, **kwargs):
    return self.forward(*args, **kwargs)
