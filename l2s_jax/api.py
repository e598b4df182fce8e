# SPDX-License-Identifier: Apache-2.0
"""The Python API: load, answer, train, evaluate, in a program of one's own.

`import l2s_jax` gives these names and imports this module at first use. The API
runs the code of the verbs `infer`, `train` and `evaluate`. An argument has the
name and the meaning of their setting; messages name it as gin files do, in
capitals. `docs/python_api.md` has examples.
"""

import contextlib
import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from l2s_jax.data import memory
from l2s_jax.inference import (
  answer_settings,
  answerer,
  generate,
  pipeline,
  predictions,
)
from l2s_jax.inference.sampling import Decoding as Decoding
from l2s_jax.models.config import TransformerConfig as TransformerConfig
from l2s_jax.runtime import gin_internals, partitioning, preemption
from l2s_jax.runtime.partitioning import MeshConfig as MeshConfig
from l2s_jax.systems import builders, parameters
from l2s_jax.systems import session as session_lib
from l2s_jax.systems.system import System as System
from l2s_jax.systems.system import Tower as Tower

Path = str | os.PathLike[str]
Examples = memory.Examples

LENGTHS: Mapping[str, int] = {'inputs': 128, 'targets': 128}
METRICS = ('bleu', 'chrf', 'exact_match')
# Settings of `answer` whose compiled programs a model keeps.
_NUM_KEPT = 8


class Model:
  """A model in memory that answers prompts; made by `load`.

  Attributes:
    system: the modules and the tokenizers.
    mesh: the device mesh.
    step: of the checkpoint; 0 of a model that this package has not trained.
  """

  def __init__(
    self,
    session: session_lib.Session,
    settings: answer_settings.AnswerSettings,
    first: answerer.PromptAnswerer,
    step: int,
  ):
    """See `load`."""
    self.system = session.system
    self.mesh = session.mesh
    self.step = step
    self._session = session
    self._settings = settings
    # Without their seeds, which the compiled programs do not have.
    self._answerers = {_with_seed(settings, 0): first}

  def answer(
    self,
    prompts: Sequence[str],
    *,
    decoding: Decoding | None = None,
    prompt_length: int | None = None,
    max_decode_len: int | None = None,
    batch_size: int | None = None,
  ) -> list[str]:
    """Returns the best answer to each prompt, in order.

    Args:
      prompts: any number of texts. A prompt of more than `prompt_length` tokens
        is cut, with a warning.
      decoding: the strategy; None is that of `load`. A sample depends on the
        seed and on the index of its prompt, and on nothing else.
      prompt_length: tokens a prompt at most; None is that of `load`.
      max_decode_len: tokens an answer at most; None is that of `load`.
      batch_size: prompts a batch; None is that of `load`.

    Raises:
      ValueError: if a prompt is not a text or empty, or a setting does not fit.
    """
    records = self.predict(
      prompts,
      decoding=decoding,
      prompt_length=prompt_length,
      max_decode_len=max_decode_len,
      batch_size=batch_size,
    )
    return [record['prediction'] for record in records]

  def predict(
    self,
    prompts: Sequence[str],
    *,
    decoding: Decoding | None = None,
    prompt_length: int | None = None,
    max_decode_len: int | None = None,
    batch_size: int | None = None,
  ) -> list[dict[str, Any]]:
    """Returns a record for each prompt, as `infer` writes them to JSON lines.

    A record has `prompt` and `prediction`; with `Decoding.num_answers` also
    `predictions`, the best first, and their `scores`; with `Decoding.log_probs`
    `score`, `token_ids` and `token_log_probs`; and `prompt_truncated` if the
    prompt was cut.

    Args and errors are those of `answer`.
    """
    _check_prompts(prompts)
    settings = self._changed(
      decoding, prompt_length, max_decode_len, batch_size
    )
    tally = predictions.Tally()
    records: list[dict[str, Any]] = []
    with self._session.entered():
      for found in pipeline.answer(
        self._answerer(settings), [{'prompt': str(text)} for text in prompts]
      ):
        records += found
    for record in records:
      tally.add(record)
    _warn_of(tally, settings.prompt_length)
    return records

  def stream(
    self,
    prompt: str,
    *,
    decoding: Decoding | None = None,
    prompt_length: int | None = None,
    max_decode_len: int | None = None,
  ) -> Iterator[str]:
    """Returns an iterator over pieces of an answer, as its tokens come.

    The pieces, joined, are the answer. A character and a stop text come whole
    or not at all.

    Args:
      prompt: one text.
      decoding: as of `answer`, without beams.
      prompt_length: as of `answer`.
      max_decode_len: as of `answer`.

    Raises:
      ValueError: as `answer`; or for `Decoding.num_beams` above 1.
    """
    if not isinstance(prompt, str):
      raise ValueError(
        f'the prompt is of type {type(prompt).__name__}: expected one text; '
        'answer takes several.'
      )
    _check_prompts([prompt])
    one = self._session.num_shards  # As `infer` answers standard input.
    settings = self._changed(decoding, prompt_length, max_decode_len, one)
    if settings.decoding.num_beams > 1:
      raise ValueError(
        f'stream with Decoding.num_beams={settings.decoding.num_beams}: which '
        'beam is the best is known at the end alone. Set it to 1, or call '
        'answer.'
      )
    return self._stream(settings, prompt)

  def _stream(
    self, settings: answer_settings.AnswerSettings, prompt: str
  ) -> Iterator[str]:
    with self._session.entered():
      writer = self._answerer(settings)
    encoded = writer.encode(prompt, row_id=0)
    if encoded.was_cut:
      tally = predictions.Tally()
      tally.add(predictions.answered({'prompt': prompt}, '', True))
      _warn_of(tally, settings.prompt_length)
    pieces = writer.pieces(encoded)
    while True:
      # Entered for each piece: the caller's code runs between two.
      with self._session.entered():
        piece = next(pieces, None)
      if piece is None:
        return
      yield piece

  def _changed(
    self,
    decoding: Decoding | None,
    prompt_length: int | None,
    max_decode_len: int | None,
    batch_size: int | None,
  ) -> answer_settings.AnswerSettings:
    """Returns the settings of `load` with those of one call; checks them."""
    given: dict[str, Any] = {
      'decoding': decoding,
      'prompt_length': prompt_length,
      'max_decode_len': max_decode_len,
      'batch_size': batch_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(self._settings, **given)
    partitioning.check_batch_size(settings.batch_size, self.mesh, 'BATCH_SIZE')
    loaded = self._settings.decoding
    for name in ('draft_len', 'quantization', 'llm_quantization'):
      now, before = getattr(settings.decoding, name), getattr(loaded, name)
      # Drafts of any length have one verifier.
      are_drafts = name == 'draft_len' and now and before
      if now != before and not are_drafts:
        raise ValueError(
          f'Decoding.{name}={now!r}: this model was loaded with {before!r}. '
          'Load it again with this decoding.'
        )
    return settings

  def _answerer(
    self, settings: answer_settings.AnswerSettings
  ) -> answerer.PromptAnswerer:
    """Returns the answerer of some settings; each is compiled once."""
    seed, settings = settings.decoding.seed, _with_seed(settings, 0)
    if settings not in self._answerers:
      first, *others = self._answerers
      if len(others) >= _NUM_KEPT:
        del self._answerers[others[0]]
      self._answerers[settings] = settings.answerer(
        self._session, self._answerers[first].params, are_prepared=True
      )
    return self._answerers[settings].with_seed(seed)


def _with_seed(
  settings: answer_settings.AnswerSettings, seed: int
) -> answer_settings.AnswerSettings:
  decoding = dataclasses.replace(settings.decoding, seed=seed)
  return dataclasses.replace(settings, decoding=decoding)


def load(
  model: Path | System,
  *,
  step: int | Literal['best'] | None = None,
  prompt_length: int = 128,
  max_decode_len: int = 128,
  batch_size: int = 32,
  decoding: Decoding | None = None,
  mesh: MeshConfig | None = None,
  llm_path: Path | None = None,
  vocabulary: Path | None = None,
  extra_ids: int = 0,
  seed: int = 0,
) -> Model:
  """Returns a model that answers prompts.

  Args:
    model: the folder of a run (its MODEL_DIR) or of a bundle; a Hugging Face
      or converted folder, a checkpoint of T5X, a GGUF file, or a name on the
      Hub; or a system of `llm_to_slm` or `language_model`, as it is before the
      first step of training.
    step: the checkpoint of a run; None is the newest, 'best' that of
      `best_metric`.
    prompt_length: tokens a prompt at most.
    max_decode_len: tokens an answer at most.
    batch_size: prompts a batch if they have `prompt_length` tokens; of shorter
      ones a batch has as many as take the same memory.
    decoding: the strategy; None is greedy. Quantization and drafts are chosen
      here, the rest at each call, too.
    mesh: device mesh and axis rules; None puts all devices along `data`.
    llm_path: the LLM of a run, if it has moved.
    vocabulary: the tokenizer of a model that brings none.
    extra_ids: sentinels that T5 adds behind its SentencePiece model.
    seed: of a system's parameters that no weights have.

  Raises:
    FileNotFoundError: if there is no model.
    ValueError: if it is damaged, or a setting does not fit.
  """
  how: dict[str, Any] = {
    'prompt_length': prompt_length,
    'max_decode_len': max_decode_len,
    'batch_size': batch_size,
    'decoding': decoding or Decoding(),
  }
  settings = answer_settings.AnswerSettings(**how)
  if isinstance(model, System):
    _refuse_beside_a_system(step, llm_path, vocabulary, extra_ids)
    session = _start(
      lambda: generate.for_decoding(model, settings.decoding), mesh, settings
    )
    with session.entered():
      _, frozen = parameters.load_frozen(session.system, session.layout)
      params = parameters.merge(frozen, _first_params(session, seed))
      return Model(session, settings, settings.answerer(session, params), 0)
  answering = answer_settings.Answering(
    os.fspath(model),
    step,
    _text(llm_path),
    _text(vocabulary),
    extra_ids,
    **how,
  )
  session = _start(answering.load_system, mesh, settings)
  with session.entered():
    chosen = answering.choose_step()
    return Model(session, settings, answering.load(session, chosen), chosen)


def _start(
  load_system: Callable[[], System],
  mesh: MeshConfig | None,
  settings: answer_settings.AnswerSettings,
) -> session_lib.Session:
  return session_lib.start(
    load_system,
    mesh,
    settings.lengths,
    batch_sizes={'BATCH_SIZE': settings.batch_size},
  )


def _first_params(session: session_lib.Session, seed: int) -> dict[str, Any]:
  from l2s_jax.training import resuming

  return resuming.first_params(session.system, session.layout, seed)


def _refuse_beside_a_system(step: Any, *others: Any) -> None:
  if step is not None or any(others):
    raise ValueError(
      'step, llm_path, vocabulary and extra_ids are of a model that a path '
      'names; a system has its own. Leave them out.'
    )


def language_model(
  path: Path | None = None,
  *,
  config: TransformerConfig | None = None,
  vocabulary: Path | None = None,
  extra_ids: int = 0,
  dropout_rate: float | None = None,
  dtype: Literal['float32', 'bfloat16'] | None = None,
  remat: str | None = None,
  attention: str | None = None,
) -> System:
  """Returns a language model alone, to be trained: an LLM or SLM baseline.

  Args:
    path: its weights, as of `load`; None starts from random parameters.
    config: its sizes; None takes those of `path`.
    vocabulary: its tokenizer; None takes that of `path`.
    extra_ids: sentinels that T5 adds behind its SentencePiece model.
    dropout_rate: in training; None keeps the config's.
    dtype: of activations; None keeps the config's. Parameters are float32.
    remat: activations that the backward pass computes again, as
      `TransformerConfig.remat`; None keeps the config's.
    attention: as `TransformerConfig.attention`; None keeps the config's.

  Raises:
    FileNotFoundError: if there are no weights or no tokenizer.
    ValueError: if config, weights and tokenizer do not fit each other.
  """
  tower = Tower(_text(path), config, _text(vocabulary), extra_ids)
  build = inspect.unwrap(builders.language_model_system)
  return build(tower, dropout_rate, dtype, remat, attention)


def llm_to_slm(llm: Path | Tower, slm: Path | Tower, **settings: Any) -> System:
  """Returns an LLM and an SLM as one system, to be trained.

  Args:
    llm: the weights of the LLM, as of `load`; a `Tower` names a config or a
      tokenizer beside them.
    slm: the weights of the SLM; a `Tower` without a path starts it from random
      parameters.
    **settings: further ones of `builders.llm_to_slm_system`, such as
      `injection`, `llm_dtype`, `llm_layer`, `train_llm` and `lora_rank`.

  Raises:
    FileNotFoundError: if there are no weights or no tokenizer.
    TypeError: for a setting that does not exist.
    ValueError: if configs, weights and tokenizers do not fit each other.
  """
  llm, slm = (
    one if isinstance(one, Tower) else Tower(os.fspath(one))
    for one in (llm, slm)
  )
  return inspect.unwrap(builders.llm_to_slm_system)(llm, slm, **settings)


def train(
  model: System,
  examples: str | Examples,
  model_dir: Path,
  *,
  train_steps: int,
  validation: Examples | None = None,
  metrics: Sequence[str] = METRICS,
  batch_size: int = 32,
  task_feature_lengths: Mapping[str, int] = LENGTHS,
  learning_rate: float = 1e-3,
  optimizer: Any = None,
  **settings: Any,
) -> dict[str, float]:
  """Trains a system into a folder, which `load` and the verbs read.

  Called again, it goes on from the newest checkpoint of the folder. Ctrl-C
  raises KeyboardInterrupt.

  Args:
    model: of `llm_to_slm` or `language_model`.
    examples: the name of a SeqIO task or mixture; or pairs (prompt, answer), a
      list or an array of [examples, 2] texts; or two columns of texts, a
      mapping with 'inputs' and 'targets'.
    model_dir: the folder.
    train_steps: updates in all, those of earlier calls included.
    validation: examples to evaluate on; None evaluates nothing. A task has its
      own.
    metrics: of the evaluation, by the names of `metrics/metric_fns.py` and
      `scores.functions`. A task has its own.
    batch_size: examples a step, over all devices.
    task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer) at
      most; longer texts are cut and counted.
    learning_rate: constant, of AdamW with b2 = 0.99.
    optimizer: another, of `training/optim.py`; None is that AdamW.
    **settings: further ones of the verb `train`, such as `eval_period`,
      `checkpoint_period`, `best_metric`, `seed`, `hooks` and `mesh`.

  Returns:
    The scores of the last evaluation, by name.

  Raises:
    FileNotFoundError: if data are missing.
    FloatingPointError: if a loss is not finite.
    TypeError: for a setting that does not exist.
    ValueError: for settings or examples that do not fit, before compilation.
  """
  from l2s_jax.training import optim
  from l2s_jax.training import train as train_lib

  if optimizer is None:
    schedule = inspect.unwrap(optim.learning_rate_schedule)
    optimizer = inspect.unwrap(optim.adamw)(
      schedule(learning_rate, 'constant'), b2=0.99
    )
  if not isinstance(model, System):
    raise ValueError(
      f'model={str(model)!r}: expected a system of llm_to_slm or '
      'language_model, which name weights by their paths.'
    )
  splits: dict[str, str | Examples] = {'train': examples}
  if validation is not None:
    splits['validation'] = validation
  elif not isinstance(examples, str):
    settings = {'eval_split': None} | settings
  with _task(splits, metrics, 'train') as task:
    arguments = {
      'model': model,
      'mixture_or_task_name': task,
      'task_feature_lengths': task_feature_lengths,
      'train_steps': train_steps,
      'model_dir': os.fspath(model_dir),
      'batch_size': batch_size,
      'optimizer': optimizer,
      **settings,
    }
    bound = _bind(train_lib.train, arguments)
    gin_internals.record('l2s_jax.train', bound.arguments)  # For config.gin.
    return _run(train_lib.train, bound)


def evaluate(
  model: Path,
  examples: str | Examples,
  *,
  split: str = 'validation',
  step: int | Literal['best'] | None = None,
  metrics: Sequence[str] = METRICS,
  task_feature_lengths: Mapping[str, int] = LENGTHS,
  batch_size: int = 32,
  decoding: Decoding | None = None,
  controls: Sequence[str] = ('none',),
  output_dir: Path | None = None,
  **settings: Any,
) -> dict[str, float]:
  """Returns the scores of a model on a task or on examples, by name.

  Metrics and predictions are written to `eval/` as by the verb.

  Args:
    model: as of `load`, by its path.
    examples: as of `train`.
    split: of a task; a name for the examples.
    step: the checkpoint of a run; None is the newest, 'best' that of
      `best_metric`.
    metrics: of the examples, as of `train`. A task has its own.
    task_feature_lengths: tokens of 'inputs' (prompt) and 'targets' (answer) at
      most.
    batch_size: examples a batch, over all devices.
    decoding: the strategy; None is greedy.
    controls: as of the verb; the scores of 'zero' are named 'zero/bleu'.
    output_dir: has `eval/`; None is the run's folder. Other models need one.
    **settings: further ones of the verb `evaluate`, such as `num_examples`,
      `num_bootstrap_samples` and `mesh`.

  Raises:
    FileNotFoundError: if model or data are missing.
    TypeError: for a setting that does not exist.
    ValueError: for settings or examples that do not fit.
  """
  from l2s_jax.evaluation import evaluate as evaluate_lib

  with _task({split: examples}, metrics, split) as task:
    arguments = {
      'checkpoint_path': os.fspath(model),
      'mixture_or_task_name': task,
      'task_feature_lengths': task_feature_lengths,
      'batch_size': batch_size,
      'steps': step,
      'split': split,
      'controls': controls,
      'output_dir': _text(output_dir),
      'decoding': decoding,
      **settings,
    }
    (found,) = _run(
      evaluate_lib.evaluate, _bind(evaluate_lib.evaluate, arguments)
    ).values()
  return {
    name if control == 'none' else f'{control}/{name}': score
    for control, scores in found.items()
    for name, score in scores.items()
  }


@contextlib.contextmanager
def _task(
  splits: Mapping[str, str | Examples], metrics: Sequence[str], first: str
) -> Iterator[str]:
  """Yields the name of a task: the given one, or that of examples in memory."""
  given = splits[first]
  if not isinstance(given, str):
    with memory.named(splits, metrics) as name:
      yield name
    return
  if len(splits) > 1:
    raise ValueError(
      f'validation was given beside the task {given!r}, which has its own '
      'splits. Leave it out; eval_split names the split.'
    )
  yield given


def _bind(
  verb: Callable[..., Any], arguments: Mapping[str, Any]
) -> inspect.BoundArguments:
  """Returns the arguments of a verb, defaults included.

  Raises:
    TypeError: for one that it does not have.
  """
  bound = inspect.signature(verb).bind(**arguments)
  bound.apply_defaults()
  return bound


def _run(verb: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
  """Calls a verb without gin: nothing but its arguments counts."""
  with preemption.signals_left_alone():
    return inspect.unwrap(verb)(*bound.args, **bound.kwargs)


def _check_prompts(prompts: Sequence[str]) -> None:
  """Refuses prompts that are not texts.

  Raises:
    ValueError: names the first.
  """
  if isinstance(prompts, str):
    raise ValueError(
      f'the prompts are one text, {prompts[:40]!r}: expected a list of texts; '
      'put it in brackets.'
    )
  for number, prompt in enumerate(prompts):
    if problem := memory.text_problem(prompt):
      raise ValueError(f'prompt {number} {problem}: expected a text.')


def _warn_of(tally: predictions.Tally, prompt_length: int) -> None:
  if report := tally.describe(prompt_length):
    warnings.warn(report, stacklevel=3)


def _text(path: Path | None) -> str | None:
  return None if path is None else os.fspath(path)
