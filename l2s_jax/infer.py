# SPDX-License-Identifier: Apache-2.0
"""Inference: prompts in, JSON lines out, in the order they came.

Reads text (a prompt a line), JSONL, a SeqIO task, or `-`, standard input,
which is answered line by line. Text, JSONL and standard input need no
TensorFlow.
"""

import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import IO, Any

import gin
import jax
import numpy as np
import tqdm
from etils import epath

from l2s_jax import (
  data,
  evaluate,
  files,
  gin_utils,
  parameters,
  partition,
  systems,
  tasks,
)

PyTree = Any


class PromptAnswerer:
  """Writes answers to prompts with a system and its parameters."""

  def __init__(
    self,
    system: systems.System,
    params: PyTree,
    mesh: jax.sharding.Mesh,
    *,
    prompt_length: int,
    max_decode_len: int,
    batch_size: int,
  ):
    """Prepares inference; compiles at the first call.

    Args:
      system: the system.
      params: all of its parameters.
      mesh: the device mesh.
      prompt_length: tokens a prompt; longer ones are cut.
      max_decode_len: tokens an answer at most.
      batch_size: prompts a batch; fewer are filled up with padding.
    """
    self._system = system
    self._params = params
    self._mesh = mesh
    self._prompt_length = prompt_length
    self._batch_size = batch_size
    self._generator = systems.generator(system, max_decode_len)
    self.num_truncated = 0

  def __call__(self, prompts: list[str]) -> list[str]:
    """Returns an answer for each of at most `batch_size` prompts."""
    vocabulary = self._system.prompt_vocabulary
    ids = [vocabulary.encode(p) + [vocabulary.eos_id] for p in prompts]
    self.num_truncated += sum(len(row) > self._prompt_length for row in ids)
    batch = data.prompt_batch(
      ids,
      length=self._prompt_length,
      pad_id=vocabulary.pad_id,
      batch_size=self._batch_size,
    )
    tokens = np.asarray(
      self._generator(self._params, partition.put_batch(batch, self._mesh))
    )
    answer_vocabulary = self._system.answer_vocabulary
    return [
      answer_vocabulary.decode(row.tolist()) for row in tokens[: len(prompts)]
    ]


def read_prompts(
  path: str, *, column: str, template: str
) -> Iterator[dict[str, Any]]:
  """Yields {'prompt': ..., other columns} from a text or JSONL file.

  Args:
    path: a text file, or one whose name ends in .jsonl; either may be .gz.
    column: of the JSONL: what goes into the template.
    template: the prompt with `{prompt}` where the text goes.

  Raises:
    ValueError: names file and line of what cannot be read: not UTF-8, broken
      JSON, or without text in the column.
  """
  is_jsonl = path.removesuffix('.gz').endswith('.jsonl')
  for number, line in enumerate(tasks.read_lines(epath.Path(path)), start=1):
    if not is_jsonl:
      yield {'prompt': template.replace('{prompt}', line)}
      continue
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}:{number} is not JSON: {error}.') from error
    text = record.get(column) if isinstance(record, dict) else None
    if not isinstance(text, str):
      raise ValueError(
        f'{path}:{number}: expected a JSON object with text in {column!r}, got '
        f'{line[:200]}. PROMPT_COLUMN says which column is read.'
      )
    yield record | {'prompt': template.replace('{prompt}', text)}


def task_prompts(task: Any, split: str) -> Iterator[dict[str, Any]]:
  """Yields {'prompt': ..., 'target': ...} of a bound SeqIO task's split."""
  dataset = task.get_dataset(None, split=split, shuffle=False, num_epochs=1)
  for example in dataset.as_numpy_iterator():
    yield {
      'prompt': example['inputs_pretokenized'].decode(),
      'target': example['targets_pretokenized'].decode(),
    }


def answer_stream(
  answerer: PromptAnswerer, source: IO[str], sink: IO[str], template: str
) -> None:
  """Answers each line as it comes, one line for one; ends with the stream."""
  for line in source:
    prompt = template.replace('{prompt}', line.rstrip('\r\n'))
    (answer,) = answerer([prompt])
    _write_record(sink, {'prompt': prompt, 'prediction': answer})
    sink.flush()


@gin.configurable(module='l2s_jax')
def infer(
  checkpoint_path: str = gin.REQUIRED,
  input: str = gin.REQUIRED,
  output_dir: str | None = None,
  prompt_length: int = gin.REQUIRED,
  max_decode_len: int = gin.REQUIRED,
  batch_size: int = 32,
  step: int | None = None,
  prompt_column: str = 'prompt',
  template: str = '{prompt}',
  split: str = 'test',
  llm_path: str | None = None,
  mesh: partition.MeshConfig | None = None,
  *,
  dry_run: bool = False,
) -> None:
  """Writes answers to prompts as JSON lines, in order.

  Args:
    checkpoint_path: the run's folder (MODEL_DIR of its training).
    input: a text or JSONL file, `task:NAME` for a SeqIO task, or `-`.
    output_dir: the folder of `predictions.jsonl`; None, or input `-`, writes
      to standard output.
    prompt_length: tokens a prompt; longer ones are cut and counted.
    max_decode_len: tokens an answer at most.
    batch_size: prompts a batch; standard input is answered one by one.
    step: the checkpoint; None takes the newest.
    prompt_column: of JSONL.
    template: the prompt with `{prompt}` where the input goes, such as
      'translate English to German: {prompt}'.
    split: of a task.
    llm_path: where the LLM's weights are, if not where the run says.
    mesh: device mesh and axis rules.
    dry_run: prints sizes and shardings, and stops.
  """
  gin_utils.check_positive(
    PROMPT_LENGTH=prompt_length,
    MAX_DECODE_LEN=max_decode_len,
    BATCH_SIZE=batch_size,
  )
  if '{prompt}' not in template:
    raise ValueError(
      f'TEMPLATE={template!r} has no {{prompt}}, where the input goes.'
    )
  is_task = input.startswith('task:')
  if input != '-' and not is_task and not pathlib.Path(input).is_file():
    raise FileNotFoundError(
      f'INPUT={input}: no such file. Give a text file, a .jsonl file (either '
      'may be .gz), task:NAME, or - for standard input.'
    )
  systems.local_folder(checkpoint_path, 'CHECKPOINT_PATH')
  mesh_config = mesh or partition.MeshConfig()
  device_mesh = partition.make_mesh(mesh_config)
  if input == '-':
    batch_size = device_mesh.shape['data'] * device_mesh.shape['fsdp']
  partition.check_batch_size(batch_size, device_mesh)
  system = systems.with_rules(
    systems.load(checkpoint_path, llm_path=llm_path), mesh_config
  )
  examples: Iterator[dict[str, Any]] = iter(())
  if is_task:
    lengths = {'inputs': prompt_length, 'targets': max_decode_len}
    task = evaluate.bind_task(system, input.removeprefix('task:'))
    evaluate.check_splits(task, lengths, read=(split,))
    examples = task_prompts(task, split)
  elif input != '-':
    examples = read_prompts(input, column=prompt_column, template=template)

  with (
    partition.use_mesh(device_mesh),
    partition.axis_rules(mesh_config.rules('slm')),
  ):
    layout = parameters.layout(system, device_mesh, mesh_config)
    parameters.check_lengths(
      system, layout, {'inputs': prompt_length, 'targets': max_decode_len}
    )
    if dry_run:
      print(parameters.summary(system, layout, None, device_mesh))
      return
    answerer = PromptAnswerer(
      system,
      parameters.load_params(system, layout, checkpoint_path, step),
      device_mesh,
      prompt_length=prompt_length,
      max_decode_len=max_decode_len,
      batch_size=batch_size,
    )
    if input == '-':
      answer_stream(answerer, sys.stdin, sys.stdout, template)
    else:
      answer_all(answerer, examples, batch_size, output_dir)
    if answerer.num_truncated:
      print(
        f'{answerer.num_truncated} prompts were longer than {prompt_length} '
        'tokens and were cut.',
        file=sys.stderr,
      )


def answer_all(
  answerer: PromptAnswerer,
  examples: Iterator[dict[str, Any]],
  batch_size: int,
  output_dir: str | None,
) -> None:
  """Writes every example with its prediction; the file appears when whole."""
  if output_dir is None:
    _write_answers(answerer, examples, batch_size, sys.stdout)
    return
  folder = systems.local_folder(output_dir, 'INFER_OUTPUT_DIR')
  with files.whole(folder / 'predictions.jsonl') as sink:
    _write_answers(answerer, examples, batch_size, sink)


def _write_answers(
  answerer: PromptAnswerer,
  examples: Iterator[dict[str, Any]],
  batch_size: int,
  sink: IO[str],
) -> None:
  with tqdm.tqdm(unit='prompt', desc='infer', file=sys.stderr) as bar:
    while chunk := list(itertools.islice(examples, batch_size)):
      answers = answerer([example['prompt'] for example in chunk])
      for example, answer in zip(chunk, answers, strict=True):
        _write_record(sink, example | {'prediction': answer})
      bar.update(len(chunk))


def _write_record(sink: IO[str], record: dict[str, Any]) -> None:
  sink.write(json.dumps(record, ensure_ascii=False) + '\n')
