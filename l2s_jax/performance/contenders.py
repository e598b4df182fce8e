# SPDX-License-Identifier: Apache-2.0
"""Contenders of a benchmark: models, systems of models, and engines.

Our systems share arrays: LLM-to-SLM uses those of the LLM's encoder and of the
SLM. If other engines take part, weights are read from their source twice: for
our systems, and for conversion. No unused copy stays in memory.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import gin
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from l2s_jax.data import batching
from l2s_jax.inference import generate, sampling, strategies
from l2s_jax.interop import to_huggingface
from l2s_jax.models import config as config_lib
from l2s_jax.models import flops, l2s, language_model
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.performance import peers, random_weights, timing
from l2s_jax.runtime import files
from l2s_jax.systems import bundle
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import base, loading
from l2s_jax.weights import hub, opening, runs
from l2s_jax.weights import source as source_lib
from l2s_jax.weights.formats import huggingface

PyTree = Any
Loaded = TypeVar('Loaded')

OURS = 'l2s_jax'
LLM, SLM, LLM_TO_SLM = 'LLM', 'SLM', 'LLM-to-SLM'
SPECULATIVE = 'speculative'
LLM_TO_EOS, SPECULATIVE_TO_EOS = 'LLM, to EOS', 'speculative, to EOS'

# Config fields without effect on the architecture or its outputs.
_UNASKED = (
  *config_lib.RUNTIME_FIELDS,
  'kernel_init_stddev',
  'embedding_init_stddev',
)
# Token ids for weights without a tokenizer.
_IDS = strategies.Ids(start=peers.START_ID, eos=-1, pad=0)


def llm_of(system: str) -> str:
  """Returns the LLM-only system whose answers end in the same way."""
  ends = system in (LLM_TO_EOS, SPECULATIVE_TO_EOS)
  return LLM_TO_EOS if ends else LLM


@dataclasses.dataclass(frozen=True)
class TimedModel:
  """A language model in the benchmark.

  Attributes:
    name: name in tables.
    source: its weights.
    config: its config, in the dtype of the benchmark.
    ids: start, EOS and padding ids of its answers.
  """

  name: str
  source: source_lib.Source
  config: config_lib.TransformerConfig
  ids: strategies.Ids = _IDS

  @property
  def writes(self) -> bool:
    """Whether it has a decoder. An encoder serves as LLM of LLM-to-SLM only."""
    shapes = self.source.shapes()
    return self.config.has_decoder and not shapes_lib.is_encoder_alone(shapes)

  @property
  def num_params(self) -> int:
    """Number of its parameters."""
    shapes = source_lib.demanded(self.config, self.source.shapes())
    return sum(shape.size for shape in shapes.values())


@dataclasses.dataclass(frozen=True)
class Pair:
  """LLM-to-SLM: two models and the parameters between them.

  Attributes:
    name: name in tables.
    module: the module of LLM-to-SLM.
    slm: its SLM; may have other weights than the SLM timed alone.
    read: function that reads a parameter outside LLM and SLM by path.
    llm_fingerprint: fingerprint of the LLM it was trained with, if known.
  """

  name: str
  module: l2s.LlmToSlm
  slm: TimedModel
  read: Callable[[shapes_lib.Path], np.ndarray]
  llm_fingerprint: str | None = None


@dataclasses.dataclass(frozen=True)
class Writer(timing.Contender):
  """A generating system, and the engine that runs it.

  Attributes:
    system: as in `timing.Contender`; also 'speculative', or 'LLM, to EOS' and
      'speculative, to EOS', whose answers end with EOS.
    dtype: dtype of the weights.
    cache_dtype: dtype of the KV cache.
    module: our module of the system, for FLOPs.
    start: function from prompts and the longest answer to a `timing.Write`.
    eos: id, or tuple of ids, that ends an answer; -1 if none does.
  """

  cache_dtype: str
  module: flops.Module
  start: timing.Start
  eos: int | tuple[int, ...] = -1

  @property
  def name(self) -> str:
    """Name that identifies the contender."""
    return f'{self.system}, {self.engine} {self.dtype}'

  @property
  def reference(self) -> str:
    """Name of the contender to compare tokens with: ours in float32."""
    # Speculative decoding writes the LLM's answers.
    is_llms = self.system in (SPECULATIVE, SPECULATIVE_TO_EOS)
    system = llm_of(self.system) if is_llms else self.system
    return f'{system}, {OURS} float32'

  @property
  def vocab_size(self) -> int:
    """Size of the prompt vocabulary."""
    if isinstance(self.module, l2s.LlmToSlm):
      return self.module.llm_config.vocab_size
    return self.module.config.vocab_size


def find_models(
  llm: system_lib.Tower | None,
  slm: system_lib.Tower | None,
  checkpoint_path: str | None,
  injection: str,
  dtype: str,
  seed: int,
) -> tuple[dict[str, TimedModel], Pair | None]:
  """Returns the models by role, and the pair if there are two.

  Args:
    llm: weights or config of the LLM, if any.
    slm: weights or config of the SLM, if any.
    checkpoint_path: a run or a pretrained model, if any.
    injection: 'add' or 'replace', without a run.
    dtype: dtype of weights and activations.
    seed: seed of random weights.

  Raises:
    ValueError: if there is no model, an encoder would have to write, or a model
      is not the run's.
    FileNotFoundError: if weights are missing.
  """
  given = {LLM: llm or system_lib.Tower(), SLM: slm or system_lib.Tower()}
  models, pair = _find_models(given, checkpoint_path, injection, dtype, seed)
  for role, model in models.items():
    if not model.writes and (role != LLM or pair is None):
      raise ValueError(
        f'{role}: {model.source.location} is encoder-only and cannot generate. '
        'Use it as the LLM with an SLM.'
      )
  return models, pair


def _find_models(
  given: Mapping[str, system_lib.Tower],
  checkpoint_path: str | None,
  injection: str,
  dtype: str,
  seed: int,
) -> tuple[dict[str, TimedModel], Pair | None]:
  if checkpoint_path is not None:
    return _of_run(checkpoint_path, given, dtype, seed)
  models = {
    role: _model(role, tower, dtype, seed + i)
    for i, (role, tower) in enumerate(given.items())
    if tower.path is not None or tower.config is not None
  }
  if not models:
    raise ValueError(
      'Nothing to time. Set LLM and SLM, or one of them, to configs (such as '
      '%T5_SMALL, with its gin file) for random weights, LLM_PATH and SLM_PATH '
      'to weights, or CHECKPOINT_PATH to an LLM-to-SLM run.'
    )
  if len(models) < 2:
    return models, None
  configs = models[LLM].config, models[SLM].config
  is_shared = configs[0].vocab_size == configs[1].vocab_size
  module = l2s.LlmToSlm(*configs, injection, is_shared)
  shapes = shapes_lib.of_module(module)

  def read(path: shapes_lib.Path) -> np.ndarray:
    return random_weights.draw(configs[1], path, shapes[path].shape, seed)

  return models, Pair(_pair_name(models), module, models[SLM], read)


def _model(
  role: str, tower: system_lib.Tower, dtype: str, seed: int
) -> TimedModel:
  if tower.path is None:
    drawn = random_weights.RandomWeights(tower.load_config(), seed)
    return TimedModel(_preset(role) or role, drawn, _at(drawn.config, dtype))
  name = pathlib.Path(tower.path).name
  source = opening.open_source(tower.path)
  ids = _IDS
  if isinstance(source, runs.Run):
    ids = _ids_of(tower.load_vocabulary())
  return TimedModel(name, source, _at(source.config, dtype), ids)


def _ids_of(vocabulary: base.Vocabulary) -> strategies.Ids:
  return strategies.Ids(
    vocabulary.start_id, vocabulary.eos_ids, vocabulary.pad_id
  )


def _preset(macro: str) -> str | None:
  """Returns the name of the preset bound to a gin macro; None without one."""
  try:
    value = repr(gin.query_parameter(f'{macro}/gin.macro.value'))
  except ValueError:  # The macro is unbound.
    return None
  return value.removeprefix('%') if value.startswith('%') else None


def _of_run(
  folder: str,
  given: Mapping[str, system_lib.Tower],
  dtype: str,
  seed: int,
) -> tuple[dict[str, TimedModel], Pair | None]:
  """Returns the models of an LLM-to-SLM run, and their pair.

  An SLM given beside the run is the one timed alone. If CHECKPOINT_PATH is
  another model, it is timed alone, in the role of the LLM.
  """
  run = _open_pair(folder)
  if run is None:
    named = [
      role for role, tower in given.items() if tower != system_lib.Tower()
    ]
    if named:
      raise ValueError(
        f'CHECKPOINT_PATH={folder} is a single language model, but '
        f'{" and ".join(named)} is set, too. Set both models as LLM_PATH and '
        'SLM_PATH.'
      )
    return {LLM: _model(LLM, system_lib.Tower(folder), dtype, seed)}, None
  description = run.description
  prompt, answer = (
    _ids_of(loading.load(f'{folder}/{runs.VOCABULARIES}/{name}'))
    for name in ('prompt', 'answer')
  )
  source = _open_llm(run, given[LLM])
  name = pathlib.Path(source.location).name
  llm = TimedModel(name, source, _at(source.config, dtype), prompt)
  run_name = pathlib.Path(folder).name
  slm = alone = TimedModel(
    run_name, run.slm, _at(run.slm.config, dtype), answer
  )
  if given[SLM].path is not None or given[SLM].config is not None:
    alone = _model(SLM, given[SLM], dtype, seed)
  models = {LLM: llm, SLM: alone}
  if description['train_llm']:
    raise ValueError(
      f'CHECKPOINT_PATH={run.location}: this run trained its LLM (TRAIN_LLM), '
      'but benchmark compares with the pretrained LLM. Choose a run with a '
      'frozen LLM.'
    )
  module = l2s.LlmToSlm(
    llm.config,
    slm.config,
    description['injection'],
    description['shared_vocabulary'],
    llm_layer=description['llm_layer'],
    llm_prefix_ids=tuple(description['llm_prefix_ids']),
  )
  others = run.others
  fingerprint = description['llm_fingerprint']
  return models, Pair(run_name, module, slm, others.__getitem__, fingerprint)


class _OpenedPair(NamedTuple):
  """LLM-to-SLM without its LLM, from a run or a bundle.

  Attributes:
    location: CHECKPOINT_PATH.
    description: the content of `model.json`.
    slm: weights of the SLM.
    others: the tensors outside LLM and SLM, by path.
    llm: the encoding part of the LLM of a bundle.
  """

  location: str
  description: Mapping[str, Any]
  slm: source_lib.Source
  others: Mapping[shapes_lib.Path, np.ndarray]
  llm: source_lib.Source | None


def _open_pair(folder: str) -> _OpenedPair | None:
  """Opens an LLM-to-SLM run or bundle; returns None for other models."""
  if bundle.is_bundle(folder):
    opened = bundle.open_bundle(folder)
    if 'slm' not in opened.towers:
      return None
    description = opened.content['model']['system']
    slm = opened.towers['slm']
    llm = opened.towers['llm']
    return _OpenedPair(folder, description, slm, opened.beside(), llm)
  source = opening.open_source(folder)
  if (
    not isinstance(source, runs.Run)
    or source.description['kind'] != 'llm_to_slm'
  ):
    return None
  return _OpenedPair(
    source.location, source.description, source, source.read_others(), None
  )


def _open_llm(run: _OpenedPair, tower: system_lib.Tower) -> source_lib.Source:
  """Opens the LLM of a run, at its stored or its given location."""
  description = run.description
  path = tower.path or description['llm_path']
  both = f'LLM_PATH={path} and CHECKPOINT_PATH={run.location}'
  if tower.path is None and tower.config is not None:
    raise ValueError(
      f'LLM is set, but CHECKPOINT_PATH={run.location} has its own LLM, '
      f'{path}. Leave LLM unset; set LLM_PATH if that LLM was moved.'
    )
  if run.llm is not None and tower.path is None:
    return run.llm
  if not pathlib.Path(path).exists() and not hub.is_name(path):
    raise FileNotFoundError(
      f'The LLM of CHECKPOINT_PATH={run.location} is not at {path}. Set '
      'LLM_PATH to its new location.'
    )
  source = opening.open_source(path, description['llm_step'])
  # Parsing fills in config fields that are newer than the run.
  config = config_lib.from_json(description['llm'], run.location, 'llm')
  differences = files.differences(
    config.to_json(), source.config.to_json(), ignored=_UNASKED
  )
  if differences:
    raise ValueError(
      f'{both}: the run was trained with another LLM. Set LLM_PATH to that '
      'one, or leave it unset:\n' + '\n'.join(differences)
    )
  return source


def _at(
  config: config_lib.TransformerConfig, dtype: str
) -> config_lib.TransformerConfig:
  return dataclasses.replace(config, dtype=dtype)


def _pair_name(models: Mapping[str, TimedModel]) -> str:
  return f'{models[LLM].name} -> {models[SLM].name}'


def ours(
  models: Mapping[str, TimedModel],
  pair: Pair | None,
  dtype: str,
  quantizations: Sequence[str],
  draft_len: int,
  to_eos: bool = False,
) -> Iterator[Writer]:
  """Yields the contenders of this package; parameters are shared.

  Args:
    models: models by role.
    pair: the pair, if there is one.
    dtype: dtype of weights and activations.
    quantizations: quantizations; each is a contender.
    draft_len: draft length of speculative decoding; 0 for none.
    to_eos: whether EOS ends the answers of speculative decoding, and of an
      additional LLM contender for comparison.

  Raises:
    ValueError: if the LLM is not the one that the run was trained with.
  """
  prepared: dict[str, dict[str, PyTree]] = {}
  for role, model in models.items():
    is_of_pair = role == LLM and pair is not None
    prepared[role] = _prepare(
      model, dtype, quantizations, pair if is_of_pair else None
    )
    if not model.writes:
      print(
        f'{role} is skipped: {model.name} is encoder-only. It is used in '
        f'{LLM_TO_SLM}.'
      )
      continue
    module = l2s.build(model.config)
    names = [role]
    if to_eos and draft_len and is_of_pair:
      names.append(LLM_TO_EOS)
    for name in names:
      ids = model.ids if name == LLM_TO_EOS else model.ids.replace(eos=-1)
      for quantization, params in prepared[role].items():
        yield _our_contender(
          name, model.name, dtype, quantization, module, params, ids
        )
  if pair is None:
    return
  slm = prepared[SLM]
  if pair.slm.source is not models[SLM].source:
    slm = _prepare(pair.slm, dtype, quantizations)
  yield from _with_pair(
    pair, models[LLM], prepared[LLM], slm, dtype, draft_len, to_eos
  )


def _with_pair(
  pair: Pair,
  llm_model: TimedModel,
  llms: Mapping[str, PyTree],
  slms: Mapping[str, PyTree],
  dtype: str,
  draft_len: int,
  to_eos: bool,
) -> Iterator[Writer]:
  """Yields LLM-to-SLM and speculative decoding for each quantization."""
  shapes = shapes_lib.of_module(pair.module)
  between = traverse_util.unflatten_dict(
    {
      path: jnp.asarray(pair.read(path), dtype)
      for path in shapes
      if path[0] not in ('llm', 'slm')
    }
  )
  of_llm = _of_llm(pair)
  for quantization, llm in llms.items():
    params = {
      'llm': {name: module for name, module in llm.items() if name in of_llm},
      'slm': slms[quantization],
      **between,
    }
    yield _our_contender(
      LLM_TO_SLM,
      pair.name,
      dtype,
      quantization,
      pair.module,
      params,
      pair.slm.ids.replace(eos=-1),
    )
    if draft_len:
      yield _our_contender(
        SPECULATIVE_TO_EOS if to_eos else SPECULATIVE,
        pair.name,
        dtype,
        quantization,
        l2s.with_verifier(pair.module),
        {**params, 'llm': llm},
        llm_model.ids if to_eos else llm_model.ids.replace(eos=-1),
        draft_len,
      )


def _of_llm(pair: Pair) -> set[str]:
  """Returns the names of the LLM's modules that LLM-to-SLM uses."""
  shapes = shapes_lib.of_module(pair.module)
  return {path[1] for path in shapes if path[0] == 'llm'}


def _prepare(
  model: TimedModel,
  dtype: str,
  quantizations: Sequence[str],
  pair: Pair | None = None,
) -> dict[str, PyTree]:
  """Returns parameters in generation layout, by quantization.

  Args:
    model: the model.
    dtype: dtype of the parameters.
    quantizations: the quantizations.
    pair: the pair whose LLM this must be; None accepts any model.

  Raises:
    ValueError: if the model is not the pair's LLM.
  """
  shapes = source_lib.demanded(model.config, model.source.shapes())
  of_pair = _of_llm(pair) if pair is not None else set()
  encodes = {path for path in shapes if path[0] in of_pair}
  params, fingerprint = _load(model.source, encodes, shapes, dtype)
  if pair is not None and pair.llm_fingerprint not in (None, fingerprint):
    raise ValueError(
      f'LLM_PATH={model.source.location} is not the LLM of '
      f'CHECKPOINT_PATH={pair.slm.source.location}: its fingerprint is '
      f'{fingerprint[:16]}, the run expects {pair.llm_fingerprint[:16]}. Set '
      'LLM_PATH to the LLM that the run was trained with.'
    )
  # Read separately: a run's fingerprint covers the encoder only.
  params |= _load(model.source, shapes.keys() - encodes, shapes, dtype)[0]
  return {
    quantization: jax.block_until_ready(
      language_model.params_for_generation(
        language_model.for_generation(model.config, quantization), params
      )
    )
    for quantization in quantizations
  }


def _load(
  source: source_lib.Source,
  paths: Collection[shapes_lib.Path],
  shapes: Mapping[shapes_lib.Path, jax.ShapeDtypeStruct],
  dtype: str,
) -> tuple[dict[str, PyTree], str]:
  """Reads tensors; returns them and their fingerprint."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = {
    path: jax.ShapeDtypeStruct(shapes[path].shape, dtype) for path in paths
  }
  return source_lib.load(
    source,
    traverse_util.unflatten_dict(wanted),
    traverse_util.unflatten_dict(dict.fromkeys(wanted, device)),
  )


def load_params(model: TimedModel) -> PyTree:
  """Returns the float32 parameters of a model in training layout."""
  shapes = source_lib.demanded(model.config, model.source.shapes())
  return _load(model.source, shapes, shapes, 'float32')[0]


def _our_contender(
  system: str,
  model: str,
  dtype: str,
  quantization: str,
  module: flops.Module,
  params: PyTree,
  ids: strategies.Ids,
  draft_len: int = 0,
) -> Writer:
  def start(prompts: np.ndarray, num_tokens: int) -> timing.Write:
    generator = generate.Generator(
      module,
      max_decode_len=num_tokens,
      ids=ids,
      decoding=sampling.Decoding(
        draft_len=draft_len,
        quantization=quantization,
        llm_quantization=quantization,
      ),
    )
    batch = batching.prompt_batch(
      prompts.tolist(), length=prompts.shape[1], pad_id=ids.pad
    )
    return timing.OurRun(generator, params, batch)

  return Writer(
    system,
    model,
    OURS,
    dtype if quantization == 'none' else quantization,
    dtype,
    module,
    start,
    ids.eos,
  )


def check_disk(
  models: Mapping[str, TimedModel], names: Sequence[str], folder: pathlib.Path
) -> None:
  """Validates that the disk has room for the weights of other engines.

  Raises:
    OSError: like that of a full disk, with the free and the required space.
  """
  engines = {
    peers.PEERS[name].engine
    for name in names
    if peers.why_missing(peers.PEERS[name]) is None
  }
  # CTranslate2 needs a converted copy.
  num_copies = 1 + ('ctranslate2' in engines) if engines else 0
  num_bytes = num_copies * sum(
    shape.size * shape.dtype.itemsize
    for model in models.values()
    if model.writes
    for shape in model.source.shapes().values()
  )
  files.check_room(
    folder,
    num_bytes,
    'other engines load their weights from BENCHMARK_DIR, and need',
    'none without --peers',
  )


def load_peers(
  models: Mapping[str, TimedModel],
  entries: Mapping[str, peers.Peer],
  scratch: pathlib.Path,
  load: Callable[[str, pathlib.Path, TimedModel], Loaded],
) -> Iterator[tuple[str, peers.Peer, Loaded]]:
  """Yields role, peer and loaded model; prints omissions with reasons.

  Args:
    models: models by role.
    entries: peers by name.
    scratch: folder for the models in Hugging Face format.
    load: function (name of the peer, folder, model) that loads the model.
  """
  present = []
  for name, peer in entries.items():
    reason = peers.why_missing(peer)
    if reason is None:
      present.append(name)
    else:
      print(f'{name} is skipped: {reason}')
  for role, model in models.items():
    if not present:
      break
    if not model.writes:
      continue
    if not huggingface.model_types(model.config):
      print(
        f'{model.name}: skipped in all peers, since transformers does not '
        'support it'
      )
      continue
    folder = scratch / role
    print(f'{model.name}: written for {", ".join(present)}')
    to_huggingface.save(model.source, folder, None)
    for name in present:
      try:
        yield role, entries[name], load(name, folder, model)
      except peers.UnsupportedError as error:
        print(f'{model.name} is skipped: {error}')


def of_peers(
  models: Mapping[str, TimedModel],
  names: Sequence[str],
  scratch: pathlib.Path,
) -> list[Writer]:
  """Returns contenders of other engines; prints omissions with reasons."""
  entries = {name: peers.PEERS[name] for name in names}

  def load(name: str, folder: pathlib.Path, model: TimedModel) -> timing.Start:
    return peers.load(name, folder, model.config, model.ids.start)

  return [
    Writer(
      role,
      models[role].name,
      peer.engine,
      peer.dtype,
      'bfloat16' if peer.dtype == 'bfloat16' else 'float32',
      l2s.build(models[role].config),
      start,
    )
    for role, peer, start in load_peers(models, entries, scratch, load)
  ]
