# SPDX-License-Identifier: Apache-2.0
"""Spoils the headers of weights at random, and counts how reading them ends.

  PYTHONPATH=.:tests python -m faults.fuzz_weights --seed=0 --count=1000

From the root of the repository; `--count` is of each family of headers. Read as
before, read otherwise (a header may say another model that the tensors fit:
another dropout, a smaller window), refused in words of ours, or, which must not
be, ended by an error of a library, by one that is no error in the input, or not
ended at all.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flax.serialization
import helpers
import numpy as np

from faults import mutate
from l2s_jax import __main__
from l2s_jax.interop import convert, to_huggingface, to_t5x
from l2s_jax.models import config as config_lib
from l2s_jax.performance import random_weights
from l2s_jax.weights import opening
from l2s_jax.weights import source as source_lib

EQUAL, OTHER, REFUSED = 'read as before', 'read otherwise', 'refused'
TRACEBACK, HANGS = 'traceback', 'hangs'
OUTCOMES = (EQUAL, OTHER, REFUSED, TRACEBACK, HANGS)
_MOST_SECS = 20
_MOST_LETTERS = 6000

_T5 = config_lib.TransformerConfig(
  vocab_size=24,
  emb_dim=8,
  num_heads=2,
  head_dim=6,
  mlp_dim=10,
  num_encoder_layers=2,
  num_decoder_layers=2,
  mlp_activations=('gelu', 'linear'),
  logits_via_embedding=False,
  scale_logits=False,
  dropout_rate=0.1,
)
LLAMA = config_lib.TransformerConfig(
  vocab_size=24,
  emb_dim=8,
  num_heads=4,
  num_kv_heads=2,
  head_dim=2,
  mlp_dim=10,
  num_decoder_layers=2,
  mlp_activations=('silu', 'linear'),
  positions='rotary',
  max_positions=32,
  rope_scaling=(4.0, 32.0, 1.0, 8.0, 1.1),
  rope_scaling_type='yarn',
  scale_attention=True,
  scale_logits=False,
)
_GEMMA3 = config_lib.TransformerConfig(
  **LLAMA.to_json()
  | {
    'mlp_activations': ('gelu', 'linear'),
    'norm_unit_offset': True,
    'post_norm': True,
    'qk_norm': True,
    'rope_scaling': (),
    'rope_scaling_type': 'llama3',
    'rope_local_base': 500.0,
    'sliding_window': 4,
    'global_layer_period': 2,
    'query_pre_attn_scalar': 4.0,
    'scale_embeddings': True,
  }
)
_GPT2 = dataclasses.replace(
  helpers.GPT2,
  vocab_size=24,
  emb_dim=8,
  head_dim=4,
  mlp_dim=10,
  max_positions=16,
)
_CONFIGS = {'t5': _T5, 'llama': LLAMA, 'gemma3': _GEMMA3, 'gpt2': _GPT2}

Spoil = Callable[[bytes, random.Random], bytes]


def spoil_start(num_bytes: int) -> Spoil:
  """Returns what spoils the header of a file, and leaves its data."""

  def spoil(content: bytes, rng: random.Random) -> bytes:
    return mutate.mutate_bytes(content[:num_bytes], rng) + content[num_bytes:]

  return spoil


def spoil_safetensors(content: bytes, rng: random.Random) -> bytes:
  length = int.from_bytes(content[:8], 'little')
  header, data = content[8 : 8 + length], content[8 + length :]
  if rng.random() < 0.3:
    return mutate.mutate_bytes(content[: 8 + length], rng) + data
  header = mutate.mutate_json_file(header, rng)
  return len(header).to_bytes(8, 'little') + header + data


def spoil_msgpack(content: bytes, rng: random.Random) -> bytes:
  if rng.random() < 0.4:
    return mutate.mutate_bytes(content, rng)
  tree = flax.serialization.msgpack_restore(content)
  tree['optimizer']['state'] = {}  # Has arrays, which JSON has not.
  with contextlib.suppress(ValueError, TypeError, OverflowError):
    return flax.serialization.msgpack_serialize(mutate.mutate_json(tree, rng))
  return mutate.mutate_bytes(content, rng)


def make(folder: pathlib.Path) -> dict[str, list[tuple[pathlib.Path, Any]]]:
  """Writes whole weights; returns the files to spoil, by family.

  With each file what spoils it; the weights are what its folder's name says.
  """
  families: dict[str, list[tuple[pathlib.Path, Any]]] = {}

  def add(family: str, path: pathlib.Path, spoil: Spoil) -> None:
    families.setdefault(family, []).append((path, spoil))

  for name, config in _CONFIGS.items():
    place = folder / name
    source = random_weights.RandomWeights(config, 0)
    to_huggingface.save(source, place, None)
    add('config.json', place / 'config.json', mutate.mutate_json_file)
    add('safetensors', place / 'model.safetensors', spoil_safetensors)
  source = random_weights.RandomWeights(_T5, 0)
  shards = folder / 'shards'
  to_huggingface.save(source, shards, None, max_file_bytes=4000)
  index = shards / 'model.safetensors.index.json'
  add('safetensors index', index, mutate.mutate_json_file)
  ours = folder / 'ours'
  with contextlib.redirect_stdout(io.StringIO()):
    convert.convert(str(folder / 't5'), str(ours), from_='hf', to='l2s')
  add('weights.json', ours / 'weights.json', mutate.mutate_json_file)
  theirs = folder / 't5x'
  to_t5x.save(source, theirs)
  checkpoint = theirs / 'checkpoint_1'
  add('T5X metadata', checkpoint / 'checkpoint', spoil_msgpack)
  add('T5X metadata', theirs / 'config.json', mutate.mutate_json_file)
  for array in ('token_embedder.embedding', 'decoder.layers_1.mlp.wo.kernel'):
    path = checkpoint / f'target.{array}' / '.zarray'
    add('T5X metadata', path, mutate.mutate_json_file)
  run = folder / 'run'
  run.mkdir()
  path = run / 'model.json'
  path.write_text(
    json.dumps(
      {
        'format_version': 1,
        'kind': 'language_model',
        'config': _T5.to_json(),
        'vocabularies': {'prompt': '0' * 64, 'answer': '0' * 64},
      }
    )
  )
  add('model.json', path, mutate.mutate_json_file)
  with contextlib.suppress(ImportError):
    path = folder / 'model.gguf'
    add('GGUF header', path, spoil_start(_write_gguf(path)))
  return families


def _write_gguf(path: pathlib.Path) -> int:
  """Writes a Llama as llama.cpp has it; returns the size of its header."""
  import gguf

  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_embedding_length(8)
  writer.add_feed_forward_length(10)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_key_length(2)
  writer.add_block_count(1)
  writer.add_context_length(32)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(1e4)
  writer.add_tokenizer_model('gpt2')
  writer.add_token_list(['a', 'b', 'ab'])
  writer.add_token_merges(['a b'])
  rng = np.random.default_rng(0)
  shapes = {
    'attn_norm': (8,), 'ffn_norm': (8,), 'attn_q': (8, 8), 'attn_k': (4, 8),
    'attn_v': (4, 8), 'attn_output': (8, 8), 'ffn_gate': (10, 8),
    'ffn_up': (10, 8), 'ffn_down': (8, 10),
  }  # fmt: skip
  shapes = {f'blk.0.{name}': shape for name, shape in shapes.items()}
  shapes |= {'token_embd': (24, 8), 'output_norm': (8,)}
  for name, shape in shapes.items():
    array = rng.normal(size=shape).astype(np.float32)
    writer.add_tensor(f'{name}.weight', array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path.stat().st_size - sum(
    -(-4 * math.prod(shape) // 32) * 32 for shape in shapes.values()
  )


def read(location: pathlib.Path) -> tuple[Any, ...]:
  """Returns all that is read of weights: the config, and every number."""
  source = opening.open_source(str(location))
  if (location / 'model.json').is_file():  # It has no checkpoint.
    return (source.config,)
  arrays = {path: source.read(path) for path in sorted(source.shapes())}
  return source.config, {
    path: source_lib.digest([source_lib.digest_layer(array)])
    for path, array in arrays.items()
  }


class _Hangs(Exception):
  """Is raised where reading does not come to an end."""


def _raise(*_: Any) -> None:
  raise _Hangs


def outcome(location: pathlib.Path, before: Any) -> tuple[str, str]:
  """Returns how reading spoilt weights ends, and its words."""
  try:
    signal.alarm(_MOST_SECS)
    with contextlib.redirect_stderr(io.StringIO()):
      found = read(location)
    return (EQUAL if found == before else OTHER), ''
  except (ValueError, OSError) as error:
    words = str(error)
    is_ours = __main__._is_deliberate(error) and len(words) < _MOST_LETTERS
    return (REFUSED if is_ours else TRACEBACK), f'{type(error)}: {words}'
  except _Hangs:
    return HANGS, ''
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # A panic of Rust is no Exception.
    return TRACEBACK, f'{type(error)}: {error}'
  finally:
    signal.alarm(0)


def fuzz(
  seed: int,
  count: int,
  say: Callable[[str], Any] = print,
  only: str = '',
) -> dict[str, collections.Counter[str]]:
  """Returns how many of `count` spoilt headers of each family end in what way.

  Args:
    seed: of what is spoilt.
    count: of each family.
    say: is told of each that ends badly.
    only: a pattern that the names of families match; '' takes all.
  """
  signal.signal(signal.SIGALRM, _raise)
  counts: dict[str, collections.Counter[str]] = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for family, files in make(folder).items():
      if not re.search(only, family):
        continue
      counts[family] = collections.Counter()
      whole = {path: _whole(folder, path) for path, _ in files}
      for i in range(count):
        rng = random.Random(f'{seed} {family} {i}')
        path, spoil = files[i % len(files)]
        location, before = whole[path]
        content = path.read_bytes()
        try:
          path.write_bytes(spoil(content, rng))
          kind, words = outcome(location, before)
        finally:
          path.write_bytes(content)
        counts[family][kind] += 1
        if kind in (TRACEBACK, HANGS):
          say(f'{family} {i} ({path.name}): {kind}: {words[:500]}')
  return counts


def _whole(folder: pathlib.Path, path: pathlib.Path) -> tuple[Any, Any]:
  """Returns where the weights of a file are, and what is read of them."""
  location = folder / path.relative_to(folder).parts[0]
  return location, read(location)


def table(counts: dict[str, collections.Counter[str]]) -> str:
  lines = ['| header of | ' + ' | '.join(OUTCOMES) + ' |', '| --- ' * 6 + '|']
  for family, counter in counts.items():
    row = ' | '.join(str(counter[kind]) for kind in OUTCOMES)
    lines.append(f'| {family} | {row} |')
  return '\n'.join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--count', type=int, default=1000)
  parser.add_argument('--only', default='', help='of a family of headers')
  args = parser.parse_args()
  began = time.monotonic()
  counts = fuzz(args.seed, args.count, only=args.only)
  print(table(counts))
  print(f'{time.monotonic() - began:.0f} s')
  bad = sum(c[TRACEBACK] + c[HANGS] for c in counts.values())
  return int(bool(bad))


if __name__ == '__main__':
  sys.exit(main())
