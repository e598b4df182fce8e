# SPDX-License-Identifier: Apache-2.0
"""Other engines, given the same weights and prompts: for `benchmark --peers`.

All are optional: their packages are imported when a peer is loaded. Weights
come from a Hugging Face folder. Each writes greedily, exactly as many tokens
as asked for, on all cores. EOS is a token like others for transformers, as for
us; CTranslate2, told to write so many, never chooses it, and answers differ
from there on. On a GPU torch may compute float32 products in TF32, as JAX does.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from l2s_jax.models import config as config_lib
from l2s_jax.performance import timing
from l2s_jax.runtime import distributed, files

# Where no run says which: no model's pad token, which T5Gemma would mask.
START_ID = 2

# What engines raise for a model that they do not know.
_REFUSALS = (
  ValueError,
  NotImplementedError,
  AttributeError,
  KeyError,
  TypeError,
  RuntimeError,
)


class Peer(NamedTuple):
  """An engine as it is timed.

  Attributes:
    engine: its name in tables.
    dtype: of its weights; in training of activations alone.
    packages: that must be installed.
    is_compiled: by torch.compile, with a cache of fixed size.
  """

  engine: str
  dtype: str
  packages: Sequence[str]
  is_compiled: bool = False


TORCH = ('torch', 'transformers')
PEERS = {
  'transformers float32': Peer('transformers', 'float32', TORCH),
  'transformers bfloat16': Peer('transformers', 'bfloat16', TORCH),
  'transformers compiled': Peer(
    'transformers compiled', 'float32', TORCH, is_compiled=True
  ),
  'ctranslate2 float32': Peer(
    'ctranslate2', 'float32', ('ctranslate2', *TORCH)
  ),
  'ctranslate2 int8': Peer('ctranslate2', 'int8', ('ctranslate2', *TORCH)),
}
# Without torch.compile, which takes minutes for a large model.
DEFAULT = tuple(name for name, peer in PEERS.items() if not peer.is_compiled)


class UnsupportedError(Exception):
  """An engine does not know a model, or refuses it."""


def versions() -> dict[str, str]:
  """Returns those of the packages that are installed."""
  packages = dict.fromkeys(name for p in PEERS.values() for name in p.packages)
  return {
    name: importlib.metadata.version(name)
    for name in packages
    if importlib.util.find_spec(name)
  }


def why_missing(peer: Peer) -> str | None:
  """Returns what a peer lacks on this machine; None: nothing."""
  for package in peer.packages:
    if importlib.util.find_spec(package) is None:
      return f'the package {package} is not installed'
  if peer.is_compiled and not any(map(shutil.which, ('c++', 'g++', 'clang++'))):
    return 'torch.compile needs a C++ compiler (c++, g++ or clang++)'
  return None


def load(
  name: str,
  folder: pathlib.Path,
  config: config_lib.TransformerConfig,
  start_id: int = START_ID,
) -> timing.Start:
  """Loads a model; returns what takes prompts and returns what writes.

  Args:
    name: of the peer, one that lacks nothing.
    folder: of Hugging Face; a converted copy is kept in it.
    config: of the model.
    start_id: the token after which an answer begins.

  Raises:
    UnsupportedError: if the engine does not know the model, or refuses it.
  """
  peer = PEERS[name]
  # All need transformers, and it needs this; raised for an odd config.json.
  from huggingface_hub import errors

  is_ctranslate2 = peer.engine == 'ctranslate2'
  load_model = _load_ctranslate2 if is_ctranslate2 else _load_transformers
  try:
    return load_model(folder, config, peer, start_id)
  except (*_REFUSALS, errors.StrictDataclassError) as error:
    raise UnsupportedError(
      f'{name} does not take the model in {folder}: '
      f'{type(error).__name__}: {error}'
    ) from error


def _load_transformers(
  folder: pathlib.Path,
  config: config_lib.TransformerConfig,
  peer: Peer,
  start_id: int,
) -> timing.Start:
  import torch
  import transformers

  model, device = torch_model(folder, config, peer.dtype)
  model = model.eval()
  if device == 'cuda':
    torch.set_float32_matmul_precision('high')  # TF32, JAX's default.
  options: dict[str, Any] = {}
  if peer.is_compiled:
    model.forward = torch.compile(model.forward, dynamic=False)
    # Else torch goes on uncompiled, and says nothing.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    options['cache_implementation'] = 'static'
  model.generation_config = transformers.GenerationConfig(
    do_sample=False,
    num_beams=1,
    use_cache=True,
    pad_token_id=0,
    decoder_start_token_id=start_id,
    **options,
  )

  def start(prompts: np.ndarray, longest: int) -> timing.Write:
    del longest  # It is said with each call.
    if peer.is_compiled:
      # Compiled functions count against a limit, and a cache stays as long as
      # the longest yet.
      torch._dynamo.reset()
      model._previous_max_cache_length = -1
    if not config.is_encoder_decoder:
      prompts = _with_start(prompts, start_id)
    tokens = torch.tensor(prompts, dtype=torch.long, device=device)
    mask = torch.ones_like(tokens)

    def run(num_tokens: int) -> np.ndarray:
      with torch.inference_mode():
        written = model.generate(
          tokens,
          attention_mask=mask,
          min_new_tokens=None,
          max_new_tokens=num_tokens,
        )
      return written[:, -num_tokens:].cpu().numpy()

    return run

  return start


def torch_model(
  folder: pathlib.Path, config: config_lib.TransformerConfig, dtype: str
) -> tuple[Any, str]:
  """Returns transformers' model in torch, where JAX computes, and the device.

  Args:
    folder: of Hugging Face.
    config: of the model.
    dtype: of its weights.
  """
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(distributed.num_cores())
  is_on_gpu = jax.default_backend() == 'gpu' and torch.cuda.is_available()
  device = 'cuda' if is_on_gpu else 'cpu'
  kind: Any = (
    transformers.AutoModelForSeq2SeqLM
    if config.is_encoder_decoder
    else transformers.AutoModelForCausalLM
  )
  model = kind.from_pretrained(folder, dtype=getattr(torch, dtype))
  return model.to(device), device


def _load_ctranslate2(
  folder: pathlib.Path,
  config: config_lib.TransformerConfig,
  peer: Peer,
  start_id: int,
) -> timing.Start:
  import ctranslate2

  converted = folder / 'ctranslate2'
  if not converted.exists():
    _convert(folder, converted, config.vocab_size, start_id)
  is_on_gpu = jax.default_backend() == 'gpu' and (
    ctranslate2.get_cuda_device_count() > 0
  )
  options = {
    'device': 'cuda' if is_on_gpu else 'cpu',
    'compute_type': peer.dtype,
    'inter_threads': 1,
    'intra_threads': distributed.num_cores(),
  }

  if config.is_encoder_decoder:
    translator = ctranslate2.Translator(str(converted), **options)

    def write(prompts: list[list[str]], num_tokens: int) -> list[list[str]]:
      results = translator.translate_batch(
        prompts,
        beam_size=1,
        max_input_length=0,
        min_decoding_length=num_tokens,
        max_decoding_length=num_tokens,
      )
      return [result.hypotheses[0] for result in results]
  else:
    generator = ctranslate2.Generator(str(converted), **options)

    def write(prompts: list[list[str]], num_tokens: int) -> list[list[str]]:
      results = generator.generate_batch(
        prompts,
        beam_size=1,
        include_prompt_in_result=False,
        min_length=num_tokens,
        max_length=num_tokens,
      )
      return [result.sequences[0] for result in results]

  def start(prompts: np.ndarray, longest: int) -> timing.Write:
    del longest  # It is said with each call.
    if not config.is_encoder_decoder:
      prompts = _with_start(prompts, start_id)
    texts = [[str(token) for token in row] for row in prompts]
    return lambda num_tokens: np.array(
      [[int(token) for token in row] for row in write(texts, num_tokens)]
    )

  return start


def _convert(
  folder: pathlib.Path, converted: pathlib.Path, vocab_size: int, start_id: int
) -> None:
  """Converts as CTranslate2 does, with ids as text for a tokenizer."""
  import ctranslate2

  class Converter(ctranslate2.converters.TransformersConverter):
    def load_tokenizer(self, *args: Any, **options: Any) -> Any:
      return _Ids(vocab_size)

  Converter(str(folder)).convert(str(converted))
  # Families find it in different places.
  path = converted / 'config.json'
  description = json.loads(path.read_text())
  if 'decoder_start_token' in description:
    description['decoder_start_token'] = str(start_id)
    files.write_json(path, description)


class _Ids:
  """The tokenizer whose pieces are the ids in digits."""

  bos_token = pad_token = '0'
  eos_token = '1'
  unk_token = '2'

  def __init__(self, vocab_size: int):
    self._vocab_size = vocab_size

  def get_vocab(self) -> dict[str, int]:
    return {str(i): i for i in range(self._vocab_size)}

  def convert_ids_to_tokens(self, token: int) -> str:
    return str(token)


def _with_start(prompts: np.ndarray, start_id: int) -> np.ndarray:
  """Appends the token after which an answer begins."""
  column = np.full((len(prompts), 1), start_id, prompts.dtype)
  return np.concatenate([prompts, column], axis=1)
