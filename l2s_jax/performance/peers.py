# SPDX-License-Identifier: Apache-2.0
"""Other engines with the same weights and prompts: `benchmark --peers`.

All engines are optional; their packages are imported on loading. Weights come
from a Hugging Face folder. Each engine decodes greedily, exactly the requested
number of tokens, on all cores. For transformers, as for this package, EOS is a
token like any other. CTranslate2 with a minimum length never selects EOS, so
its answers differ after that point.
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

# Default start id. Not the pad id of a model, which T5Gemma would mask.
START_ID = 2

# Exceptions of engines for unsupported models.
_REFUSALS = (
  ValueError,
  NotImplementedError,
  AttributeError,
  KeyError,
  TypeError,
  RuntimeError,
)


class Peer(NamedTuple):
  """An engine in a benchmark.

  Attributes:
    engine: name in tables.
    dtype: dtype of its weights; in training, of activations only.
    packages: required packages.
    is_compiled: whether it uses torch.compile with a static KV cache.
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
  'ctranslate2 bfloat16': Peer(
    'ctranslate2', 'bfloat16', ('ctranslate2', *TORCH)
  ),
  'ctranslate2 int8': Peer('ctranslate2', 'int8', ('ctranslate2', *TORCH)),
}
# Without torch.compile, which compiles a large model for minutes.
DEFAULT = tuple(name for name, peer in PEERS.items() if not peer.is_compiled)


class UnsupportedError(Exception):
  """An engine does not support a model."""


def versions() -> dict[str, str]:
  """Returns the versions of the installed packages of all peers."""
  packages = dict.fromkeys(name for p in PEERS.values() for name in p.packages)
  return {
    name: importlib.metadata.version(name)
    for name in packages
    if importlib.util.find_spec(name)
  }


def why_missing(peer: Peer) -> str | None:
  """Returns the reason why a peer cannot run here; None if it can."""
  for package in peer.packages:
    if importlib.util.find_spec(package) is None:
      return f'the package {package} is not installed'
  if peer.engine == 'ctranslate2':
    import ctranslate2

    known = ctranslate2.get_supported_compute_types(_ctranslate2_device())
    if peer.dtype not in known:
      return f'CTranslate2 has no {peer.dtype} on this machine'
  if peer.is_compiled and not any(map(shutil.which, ('c++', 'g++', 'clang++'))):
    return 'torch.compile needs a C++ compiler (c++, g++ or clang++)'
  return None


def load(
  name: str,
  folder: pathlib.Path,
  config: config_lib.TransformerConfig,
  start_id: int = START_ID,
) -> timing.Start:
  """Loads a model into an engine.

  Args:
    name: name of an available peer.
    folder: the model in Hugging Face format; may receive a converted copy.
    config: config of the model.
    start_id: decoder start token.

  Returns:
    A function from prompts and the longest answer to a `timing.Write`.

  Raises:
    UnsupportedError: if the engine does not support the model.
  """
  peer = PEERS[name]
  # transformers, which all peers need, depends on huggingface_hub, which raises
  # this error for an invalid config.json.
  from huggingface_hub import errors

  is_ctranslate2 = peer.engine == 'ctranslate2'
  load_model = _load_ctranslate2 if is_ctranslate2 else _load_transformers
  try:
    return load_model(folder, config, peer, start_id)
  except (*_REFUSALS, errors.StrictDataclassError) as error:
    raise UnsupportedError(
      f'{name} cannot load the model in {folder}: {type(error).__name__}: '
      f'{error}'
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
    torch.set_float32_matmul_precision('high')  # TF32, as JAX's default
  options: dict[str, Any] = {}
  if peer.is_compiled:
    model.forward = torch.compile(model.forward, dynamic=False)
    # Otherwise torch silently continues uncompiled.
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
    del longest  # each call has its length
    if peer.is_compiled:
      # Compiled functions count against a limit, and a static cache keeps its
      # largest size.
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
  """Loads a model of transformers on the device kind that JAX uses.

  Args:
    folder: the model in Hugging Face format.
    config: config of the model.
    dtype: dtype of its weights.

  Returns:
    The model and its torch device, 'cuda' or 'cpu'.
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
  options = {
    'device': _ctranslate2_device(),
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
    del longest  # each call has its length
    if not config.is_encoder_decoder:
      prompts = _with_start(prompts, start_id)
    texts = [[str(token) for token in row] for row in prompts]
    return lambda num_tokens: np.array(
      [[int(token) for token in row] for row in write(texts, num_tokens)]
    )

  return start


def _ctranslate2_device() -> str:
  """Returns CTranslate2's name of the device kind that JAX uses."""
  import ctranslate2

  is_on_gpu = jax.default_backend() == 'gpu' and (
    ctranslate2.get_cuda_device_count() > 0
  )
  return 'cuda' if is_on_gpu else 'cpu'


def _convert(
  folder: pathlib.Path, converted: pathlib.Path, vocab_size: int, start_id: int
) -> None:
  """Converts a model for CTranslate2, with decimal ids as its vocabulary."""
  import ctranslate2

  class Converter(ctranslate2.converters.TransformersConverter):
    def load_tokenizer(self, *args: Any, **options: Any) -> Any:
      return _Ids(vocab_size)

  Converter(str(folder)).convert(str(converted))
  # Model families read the start token from different places.
  path = converted / 'config.json'
  description = json.loads(path.read_text())
  if 'decoder_start_token' in description:
    description['decoder_start_token'] = str(start_id)
    files.write_json(path, description)


class _Ids:
  """A tokenizer whose pieces are token ids in decimal."""

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
  """Appends the decoder start token to prompts."""
  column = np.full((len(prompts), 1), start_id, prompts.dtype)
  return np.concatenate([prompts, column], axis=1)
