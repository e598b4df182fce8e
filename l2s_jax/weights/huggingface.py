# SPDX-License-Identifier: Apache-2.0
"""Weights in a Hugging Face folder: config.json beside safetensors files.

A family is a table from our names to those of the package transformers, with
the axes of both, and a function from its config.json to ours. Reading goes
through the table one tensor at a time; nothing is unpickled. Tokenizers are
not here but in `vocabularies.py`.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from l2s_jax.models import config as config_lib

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

# As transformers names them. Its 'gelu' is the exact one, ours the tanh
# approximation, so that name is not here.
_ACTIVATIONS = {
  'relu': 'relu',
  'gelu_new': 'gelu',
  'gelu_pytorch_tanh': 'gelu',
  'silu': 'silu',
  'swish': 'silu',
}
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our tensors, and the tensor of theirs in which it is stored.

  Attributes:
    ours: canonical name.
    theirs: name in the file; `{layer}` where each layer has one.
    axes: 'THEIRS -> OURS' of one layer, letters as in `models/layers.py`, and
      r relpos_buckets, p abspos_buckets, c the parts of a fused projection.
      Axes in parentheses are merged.
    part: which of `c` is ours.
  """

  ours: str
  theirs: str
  axes: str
  part: int = 0

  @property
  def path(self) -> tuple[str, ...]:
    return tuple(self.ours.split('/'))

  @property
  def is_stacked(self) -> bool:
    return '{layer}' in self.theirs

  def names(self, config: config_lib.TransformerConfig) -> list[str]:
    """Returns the names in the file, one a layer."""
    if not self.is_stacked:
      return [self.theirs]
    num_layers = (
      config.num_encoder_layers
      if self.path[0] == 'encoder'
      else config.num_decoder_layers
    )
    return [self.theirs.format(layer=layer) for layer in range(num_layers)]

  def groups(self) -> list[list[str]]:
    """Returns the axes of theirs, each as the letters merged in it."""
    theirs, _ = self.axes.split(' -> ')
    return [
      group.strip('()').split() for group in re.findall(r'\(.*?\)|\w', theirs)
    ]

  def letters(self) -> list[str]:
    """Returns the axes of ours."""
    return self.axes.split(' -> ')[1].split()

  def to_ours(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns our tensor, of one layer, out of theirs."""
    letters = [letter for group in self.groups() for letter in group]
    array = array.reshape([sizes[letter] for letter in letters])
    if 'c' in letters:
      array = array.take(self.part, axis=letters.index('c'))
      letters.remove('c')
    return array.transpose([letters.index(axis) for axis in self.letters()])


def _under(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
  """Returns the rows with both names prefixed."""
  return tuple(
    dataclasses.replace(row, ours=ours + row.ours, theirs=theirs + row.theirs)
    for row in rows
  )


# PyTorch's Linear keeps [out, in].
_T5_ATTENTION = (
  Row('query/kernel', 'q.weight', '(n h) d -> d n h'),
  Row('key/kernel', 'k.weight', '(n h) d -> d n h'),
  Row('value/kernel', 'v.weight', '(n h) d -> d n h'),
  Row('out/kernel', 'o.weight', 'd (n h) -> n h d'),
)
_T5_MLP = (
  Row('wi/kernel', 'wi.weight', 'f d -> d f'),
  Row('wi_0/kernel', 'wi_0.weight', 'f d -> d f'),
  Row('wi_1/kernel', 'wi_1.weight', 'f d -> d f'),
  Row('wo/kernel', 'wo.weight', 'd f -> f d'),
)
_T5_RELPOS = (
  Row(
    'relpos_bias/rel_embedding',
    'block.0.layer.0.SelfAttention.relative_attention_bias.weight',
    'r n -> n r',
  ),
  Row('final_norm/scale', 'final_layer_norm.weight', 'd -> d'),
)
_T5 = (
  Row('token_embedder/embedding', 'shared.weight', 'v d -> v d'),
  Row('logits_dense/kernel', 'lm_head.weight', 'v d -> d v'),
  *_under('encoder/', 'encoder.', _T5_RELPOS),
  *_under('decoder/', 'decoder.', _T5_RELPOS),
  *_under(
    'encoder/layers/',
    'encoder.block.{layer}.layer.',
    (
      Row('pre_self_attention_norm/scale', '0.layer_norm.weight', 'd -> d'),
      *_under('self_attention/', '0.SelfAttention.', _T5_ATTENTION),
      Row('pre_mlp_norm/scale', '1.layer_norm.weight', 'd -> d'),
      *_under('mlp/', '1.DenseReluDense.', _T5_MLP),
    ),
  ),
  *_under(
    'decoder/layers/',
    'decoder.block.{layer}.layer.',
    (
      Row('pre_self_attention_norm/scale', '0.layer_norm.weight', 'd -> d'),
      *_under('self_attention/', '0.SelfAttention.', _T5_ATTENTION),
      Row('pre_cross_attention_norm/scale', '1.layer_norm.weight', 'd -> d'),
      *_under('cross_attention/', '1.EncDecAttention.', _T5_ATTENTION),
      Row('pre_mlp_norm/scale', '2.layer_norm.weight', 'd -> d'),
      *_under('mlp/', '2.DenseReluDense.', _T5_MLP),
    ),
  ),
)

# GPT-2's Conv1D keeps [in, out].
_LAYER_NORM = (
  Row('scale', 'weight', 'd -> d'),
  Row('bias', 'bias', 'd -> d'),
)
_GPT2 = (
  Row('token_embedder/embedding', 'wte.weight', 'v d -> v d'),
  Row('position_embedder/embedding', 'wpe.weight', 'p d -> p d'),
  Row('logits_dense/kernel', 'lm_head.weight', 'v d -> d v'),
  *_under('decoder/final_norm/', 'ln_f.', _LAYER_NORM),
  *_under(
    'decoder/layers/',
    'h.{layer}.',
    (
      *_under('pre_self_attention_norm/', 'ln_1.', _LAYER_NORM),
      *_under(
        'self_attention/',
        'attn.',
        (
          Row('query/kernel', 'c_attn.weight', 'd (c n h) -> d n h', part=0),
          Row('key/kernel', 'c_attn.weight', 'd (c n h) -> d n h', part=1),
          Row('value/kernel', 'c_attn.weight', 'd (c n h) -> d n h', part=2),
          Row('query/bias', 'c_attn.bias', '(c n h) -> n h', part=0),
          Row('key/bias', 'c_attn.bias', '(c n h) -> n h', part=1),
          Row('value/bias', 'c_attn.bias', '(c n h) -> n h', part=2),
          Row('out/kernel', 'c_proj.weight', '(n h) d -> n h d'),
          Row('out/bias', 'c_proj.bias', 'd -> d'),
        ),
      ),
      *_under('pre_mlp_norm/', 'ln_2.', _LAYER_NORM),
      *_under(
        'mlp/',
        'mlp.',
        (
          Row('wi/kernel', 'c_fc.weight', 'd f -> d f'),
          Row('wi/bias', 'c_fc.bias', 'f -> f'),
          Row('wo/kernel', 'c_proj.weight', 'f d -> f d'),
          Row('wo/bias', 'c_proj.bias', 'd -> d'),
        ),
      ),
    ),
  ),
)


def axis_sizes(config: config_lib.TransformerConfig) -> dict[str, int]:
  """Returns the size of each letter in `Row.axes`."""
  return {
    'd': config.emb_dim,
    'n': config.num_heads,
    'h': config.head_dim,
    'f': config.mlp_dim,
    'v': config.vocab_size,
    'r': config.relpos_buckets,
    'p': config.max_positions,
    'c': 3,  # query, key, value
  }


def _t5_config(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  projection = config.get(
    'feed_forward_proj',
    'gated-gelu' if config['model_type'] == 'mt5' else 'relu',
  )
  is_gated = config.get('is_gated_act', projection.startswith('gated-'))
  activation = config.get(
    'dense_act_fn',
    # What T5 calls GELU is the tanh approximation; transformers corrects the
    # name in this one case.
    'gelu_new'
    if projection == 'gated-gelu'
    else projection.removeprefix('gated-'),
  )
  # Only T5 v1.0 scales. Its config.json says so in its own words since
  # transformers 5; before, whether the head is tied stood for it.
  scale_logits = config['model_type'] == 't5' and config.get(
    'scale_decoder_outputs', config.get('tie_word_embeddings', True)
  )
  if scale_logits and not is_tied:
    raise ValueError(
      'it asks for scaled logits (scale_decoder_outputs, or '
      'tie_word_embeddings, is not false) and lm_head.weight is not the '
      'embedding table. A T5 v1.1 has tie_word_embeddings=false'
    )
  num_layers = config['num_layers']
  return config_lib.TransformerConfig(
    vocab_size=config['vocab_size'],
    emb_dim=config['d_model'],
    num_heads=config['num_heads'],
    head_dim=config['d_kv'],
    mlp_dim=config['d_ff'],
    num_encoder_layers=num_layers,
    num_decoder_layers=config.get('num_decoder_layers') or num_layers,
    mlp_activations=(_activation(activation), 'linear')
    if is_gated
    else (_activation(activation),),
    norm_epsilon=config.get('layer_norm_epsilon', 1e-6),
    relpos_buckets=config.get('relative_attention_num_buckets', 32),
    relpos_max_distance=config.get('relative_attention_max_distance', 128),
    logits_via_embedding=is_tied,
    scale_logits=scale_logits,
    dropout_rate=config.get('dropout_rate', 0.1),
  )


def _gpt2_config(
  config: Mapping[str, Any], is_tied: bool
) -> config_lib.TransformerConfig:
  d, num_heads = config['n_embd'], config['n_head']
  if d % num_heads:
    raise ValueError(f'n_embd={d} does not divide over n_head={num_heads}')
  stddev = config.get('initializer_range', 0.02)
  return config_lib.TransformerConfig(
    vocab_size=config['vocab_size'],
    emb_dim=d,
    num_heads=num_heads,
    head_dim=d // num_heads,
    mlp_dim=config.get('n_inner') or 4 * d,
    num_decoder_layers=config['n_layer'],
    mlp_activations=(
      _activation(config.get('activation_function', 'gelu_new')),
    ),
    norm='layer',
    norm_epsilon=config.get('layer_norm_epsilon', 1e-5),
    use_bias=True,
    positions='learned',
    max_positions=config['n_positions'],
    scale_attention=config.get('scale_attn_weights', True),
    logits_via_embedding=is_tied,
    scale_logits=False,
    dropout_rate=config.get('resid_pdrop', 0.1),
    kernel_init_stddev=stddev,
    embedding_init_stddev=stddev,
  )


def _activation(name: str) -> str:
  if name not in _ACTIVATIONS:
    raise ValueError(
      f'its activation is {name!r}; supported are {", ".join(_ACTIVATIONS)}'
    )
  return _ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class Family:
  """What sets one `model_type` apart.

  Attributes:
    rows: the table of names.
    parse: from config.json, and whether the output head is the embedding
      table, to our config; its ValueError continues 'FILE: ...'.
    required: keys without which config.json says nothing.
    fixed: keys of which only this value, the default, is supported.
    prefix: in front of all names but the head's, in some files.
    aliases: other names of a tensor, for files that lack its own.
    ignored: matches names that may be present and mean nothing.
  """

  rows: tuple[Row, ...]
  parse: Callable[[Mapping[str, Any], bool], config_lib.TransformerConfig]
  required: tuple[str, ...]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  prefix: str = ''
  aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  ignored: str = '$'


_T5_FAMILY = Family(
  rows=_T5,
  parse=_t5_config,
  required=(
    'vocab_size',
    'd_model',
    'd_kv',
    'd_ff',
    'num_layers',
    'num_heads',
  ),
  fixed={'quantization_config': None},
  aliases={
    'shared.weight': (
      'encoder.embed_tokens.weight',
      'decoder.embed_tokens.weight',
    )
  },
  # The first release gave cross-attention a bias that nothing read.
  ignored=r'(en|de)coder\.embed_tokens\.weight'
  r'|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias'
  r'\.weight',
)

FAMILIES = {
  't5': _T5_FAMILY,
  'mt5': _T5_FAMILY,
  'gpt2': Family(
    rows=_GPT2,
    parse=_gpt2_config,
    required=('vocab_size', 'n_embd', 'n_layer', 'n_head', 'n_positions'),
    fixed={
      'quantization_config': None,
      'scale_attn_by_inverse_layer_idx': False,
      'add_cross_attention': False,
    },
    prefix='transformer.',
    ignored=r'h\.\d+\.attn\.(bias|masked_bias)',  # causal masks
  ),
}


class _Tensor(NamedTuple):
  """Where a tensor is, and what its file's header says of it."""

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str


class Folder:
  """The weights of a T5, mT5 or GPT-2 as `save_pretrained` leaves them."""

  def __init__(self, folder: pathlib.Path):
    """Reads config.json and the headers of the weights, and checks them.

    Raises:
      FileNotFoundError: if there are no safetensors, or some are missing.
      ValueError: if the family is not supported, a file is broken, or the
        tensors are not those that config.json describes; lists all of these.
    """
    self.location = str(folder)
    path = folder / CONFIG
    config = _read_json(path)
    family = _family(path, config)
    self._tensors = _read_headers(folder, config, family)
    try:
      self.config = family.parse(config, self._is_tied(config, family))
    except ValueError as error:
      raise ValueError(f'{path}: {error}.') from error
    self._sizes = axis_sizes(self.config)
    self._rows = {
      row.path: row
      for row in family.rows
      if any(name in self._tensors for name in row.names(self.config))
      # A tied head that is stored all the same is the table again.
      and not (
        row.path[0] == 'logits_dense' and self.config.logits_via_embedding
      )
    }
    self._check(family)

  def step(self) -> int | None:
    return None

  def shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
    shapes = {}
    for path, row in self._rows.items():
      shape = tuple(self._sizes[letter] for letter in row.letters())
      if row.is_stacked:
        shape = (len(row.names(self.config)), *shape)
      shapes[path] = shape
    return shapes

  def read(self, path: tuple[str, ...]) -> np.ndarray:
    row = self._rows[path]
    layers = [
      row.to_ours(self._read(name), self._sizes)
      for name in row.names(self.config)
    ]
    return np.stack(layers) if row.is_stacked else layers[0]

  def _read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    # Numpy knows bfloat16 as soon as JAX is imported, which models/ does.
    with safetensors.safe_open(tensor.file, framework='np') as file:
      return file.get_tensor(tensor.name)

  def _is_tied(self, config: Mapping[str, Any], family: Family) -> bool:
    """Returns whether the output head is the embedding table.

    The weights have the last word: transformers 5 writes tie_word_embeddings
    as true into the config.json of every T5, tied or not.
    """
    names = {row.ours: row.theirs for row in family.rows}
    head, table = (
      names['logits_dense/kernel'],
      names['token_embedder/embedding'],
    )
    if head not in self._tensors:
      return True
    if not config.get('tie_word_embeddings', True):
      return False
    return table in self._tensors and np.array_equal(
      self._read(head), self._read(table)
    )

  def _check(self, family: Family) -> None:
    """Refuses tensors that are missing, unknown, or of another shape."""
    problems = []
    known = set()
    for row in family.rows:
      known |= set(row.names(self.config))
    for row in self._rows.values():
      expected = tuple(
        math.prod(self._sizes[letter] for letter in group)
        for group in row.groups()
      )
      for name in row.names(self.config):
        if name not in self._tensors:
          problems.append(f'{name} {expected}: missing')
        elif self._tensors[name].shape != expected:
          problems.append(
            f'{name}: expected {expected}, found {self._tensors[name].shape}'
          )
        elif self._tensors[name].dtype not in _FLOATS:
          problems.append(
            f'{name}: expected one of {", ".join(_FLOATS)}, found '
            f'{self._tensors[name].dtype}; quantized weights are not supported'
          )
    # Beside a tensor that is read, one that is not (a layer more, an adapter)
    # means another model; elsewhere it is a head for another use.
    scopes = {row.theirs.split('.')[0] for row in self._rows.values()}
    problems += [
      f'{name} {tensor.shape}: unknown'
      for name, tensor in self._tensors.items()
      if name not in known
      and name.split('.')[0] in scopes
      and not re.fullmatch(family.ignored, name)
    ]
    if problems:
      raise ValueError(
        f'The tensors in {self.location} are not those that its {CONFIG} '
        'describes. Use the files as they were saved together:\n  '
        + '\n  '.join(sorted(set(problems)))
      )


def _family(path: pathlib.Path, config: Mapping[str, Any]) -> Family:
  """Returns the family, after what it demands of config.json."""
  model_type = config.get('model_type')
  if model_type not in FAMILIES:
    raise ValueError(
      f'{path}: model_type is {model_type!r}; supported are '
      f'{", ".join(FAMILIES)}.'
    )
  family = FAMILIES[model_type]
  problems = [f'{key}: missing' for key in family.required if key not in config]
  problems += [
    f'{key}: only {value!r} is supported, found {config[key]!r}'
    for key, value in family.fixed.items()
    if config.get(key, value) != value
  ]
  if problems:
    raise ValueError(
      f'{path} does not describe a {model_type} that can be read:\n  '
      + '\n  '.join(problems)
    )
  return family


def _read_headers(
  folder: pathlib.Path, config: Mapping[str, Any], family: Family
) -> dict[str, _Tensor]:
  """Returns all tensors of a folder, by the names in the family's table."""
  tensors: dict[str, _Tensor] = {}
  for path in _files(folder, config):
    with _open(path) as file:
      for stored in file.keys():
        header = file.get_slice(stored)
        name = stored.removeprefix(family.prefix)
        tensors[name] = _Tensor(
          path, stored, tuple(header.get_shape()), header.get_dtype()
        )
  for name, aliases in family.aliases.items():
    for alias in aliases:
      if name not in tensors and alias in tensors:
        tensors[name] = tensors[alias]
  return tensors


def _files(
  folder: pathlib.Path, config: Mapping[str, Any]
) -> list[pathlib.Path]:
  """Returns the safetensors files of a folder, all of them there."""
  if (folder / WEIGHTS).is_file():
    return [folder / WEIGHTS]
  index = folder / INDEX
  if not index.is_file():
    found = sorted(
      path.name
      for path in folder.iterdir()
      if path.suffix in ('.bin', '.h5', '.msgpack', '.pt', '.ckpt')
    )
    architecture = (config.get('architectures') or ['AutoModel'])[0]
    raise FileNotFoundError(
      f'{folder} has neither {WEIGHTS} nor {INDEX}'
      + (f', only {", ".join(found)}' if found else '')
      + '. Files that must be unpickled can run code and are never read here. '
      'Where the package transformers is installed, convert them with: '
      f'python -c "import transformers as t; m = t.{architecture}.'
      f"from_pretrained('{folder}'); m.save_pretrained('{folder}')\""
    )
  names = sorted(set(_read_json(index).get('weight_map', {}).values()))
  missing = [name for name in names if not (folder / name).is_file()]
  if missing or not names:
    raise FileNotFoundError(
      f'{index} lists {len(names)} files; missing: '
      f'{", ".join(missing) or "all"}. Download them into {folder}.'
    )
  return [folder / name for name in names]


def _open(path: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(path, framework='np')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} ({path.stat().st_size} bytes) is not a whole safetensors file: '
      f'{error}. The download may have been cut short, or left a Git LFS '
      'pointer; download it again.'
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{path} is not JSON: {error}. Download it again.'
    ) from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} holds no JSON object. Download it again.')
  return content
