# SPDX-License-Identifier: Apache-2.0
"""Reads broken files and settings; each must end in one sentence, or well.

    PYTHONPATH=.:tests python -m faults.fuzz_files --seed=0 --count=3000

prints, for each kind of file, how many were read and how many refused, and the
first faults that ended in a library's traceback, with what reproduces them;
`--kinds=best,gin` chooses among them. The exit status is 1 if there was one.
tests/test_faults_fuzz.py runs a short form.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import gzip
import importlib
import io
import json
import pathlib
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence

import gin
import tokenizers

from faults import mutate
from l2s_jax import __main__ as command_line
from l2s_jax.evaluation import evaluate, metric_writer, report
from l2s_jax.inference import predictions, prompts
from l2s_jax.runtime import gin_config, gin_internals, os_errors
from l2s_jax.vocabularies import loading
from l2s_jax.weights import run_format, saved_steps

TEXT = 'Translate: ten ș 123 <a>  twelve\tfives 🙂\n'
# A Python panic of Rust's is no Exception.
_PANIC = 'PanicException'
# For each case, where SIGALRM has a handler.
_MOST_SECS = 20


@dataclasses.dataclass(frozen=True)
class Kind:
  """A file that we read.

  Attributes:
    name: of the file, within a folder of its own.
    content: of a good one.
    read: reads the folder; its answer does not matter.
    mutate: breaks the content.
    others: files beside it that stay good.
  """

  name: str
  content: bytes
  read: Callable[[pathlib.Path], object]
  mutate: Callable[[bytes, random.Random], bytes] = mutate.mutate_json_file
  others: dict[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Result:
  """What came of the files of a kind."""

  num_read: int = 0
  num_refused: int = 0
  tracebacks: list[str] = dataclasses.field(default_factory=list)
  messages: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )


def _dump(value: object) -> bytes:
  return json.dumps(value, indent=1).encode()


def _mutate_lines(content: bytes, rng: random.Random) -> bytes:
  """Breaks one record of a log, or the file as bytes."""
  if rng.random() < 0.3:
    return mutate.mutate_bytes(content, rng)
  lines = content.splitlines(keepends=True)
  index = rng.randrange(len(lines))
  line = mutate.mutate_json_file(lines[index], rng)
  lines[index] = line.replace(b'\n', b' ') + b'\n'
  return b''.join(lines)


def _read_log(folder: pathlib.Path) -> None:
  metric_writer.MetricWriter(folder, first_step=3).close()
  metric_writer.by_step(folder, prefix='eval/')


def _read_scores(folder: pathlib.Path) -> None:
  found = evaluate.read_scores(folder / 'metrics-x-test.json')
  for by_control in found.values():
    for scores in by_control.values():
      scores.pop('settings', None)
  report.steps_table(
    {int(step): row['none'] for step, row in found.items() if 'none' in row}
  )


_SETTINGS = {
  'format_version': run_format.FORMAT_VERSION,
  'checkpoint_path': '/runs/x',
  'checkpoint_saved_nsecs': 1784190845012345678,
  'decoding': {'temperature': 0.0, 'stop': [], 'num_beams': 1},
  'input': 'prompts.txt',
  'max_decode_len': 32,
  'max_decode_len_column': None,
  'prompt_length': 64,
  'step': 100,
  'template': '{prompt}',
}


def _read_settings(folder: pathlib.Path) -> None:
  predictions.settle(folder, _SETTINGS)


def _read_answers(folder: pathlib.Path) -> None:
  with predictions.GrowingFile(folder / 'predictions.jsonl'):
    pass


_ROWS = [
  {'prompt': 'Ten fives, "quoted"', 'answer': '50'},
  {'prompt': 'ș 🙂 \u2028 \u05d0\u05d1', 'answer': ' x '},
  {'prompt': 'tab, comma; and so on', 'answer': 'y'},
]


def _read_prompts(folder: pathlib.Path) -> None:
  """Reads data files as `infer` does; plain and packed must be alike."""
  template = prompts.parse_template('{prompt}')
  (path,) = folder.iterdir()
  items = list(prompts.read_file(str(path), template))
  if path.suffix == '.txt':
    with path.open('rb') as stream:
      found = list(prompts.read_stream(stream, template))
    numbers = [
      [n for n, item in enumerate(each) if isinstance(item, prompts.BadLine)]
      for each in (items, found)
    ]
    assert numbers[0] == numbers[1], 'standard input has other bad lines'
    assert [i for i in items if isinstance(i, dict)] == [
      i for i in found if isinstance(i, dict)
    ], 'standard input has other prompts'
  elif path.suffix != '.gz':
    packed = path.with_name(f'{path.name}.gz')
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    again = list(prompts.read_file(str(packed), template))
    assert list(map(_unnamed, items)) == list(map(_unnamed, again)), 'gzip'


def _unnamed(item: prompts.Item) -> object:
  return item[1:] if isinstance(item, prompts.BadLine) else item


def _data_files() -> dict[str, bytes]:
  """Returns a good file of each kind that people write by hand."""
  table = io.StringIO()
  writer = csv.DictWriter(table, [*_ROWS[0]])
  writer.writeheader()
  writer.writerows(_ROWS)
  lines = [[*_ROWS[0]], *([*row.values()] for row in _ROWS)]
  found = {
    'jsonl': '\n'.join(json.dumps(row) for row in _ROWS),
    'json': json.dumps(_ROWS, ensure_ascii=False),
    'csv': table.getvalue(),
    'tsv': '\n'.join('\t'.join(line) for line in lines),
    'txt': '\n'.join(row['prompt'] for row in _ROWS),
  }
  contents = {name: content.encode() for name, content in found.items()}
  return contents | {'jsonl.gz': gzip.compress(contents['jsonl'], 1, mtime=0)}


def _read_tokenizer(folder: pathlib.Path) -> None:
  vocabulary = loading.load(folder)
  vocabulary.decode(vocabulary.encode(TEXT))


def _tokenizer(kind: str) -> bytes:
  """Returns a small `tokenizer.json` with a bit of everything in it."""
  model, trainer = {
    'bpe': (
      tokenizers.models.BPE(byte_fallback=True, unk_token='<unk>'),
      tokenizers.trainers.BpeTrainer,
    ),
    'unigram': (
      tokenizers.models.Unigram(),
      tokenizers.trainers.UnigramTrainer,
    ),
    'wordpiece': (
      tokenizers.models.WordPiece(unk_token='<unk>'),
      tokenizers.trainers.WordPieceTrainer,
    ),
  }[kind]
  made = tokenizers.Tokenizer(model)
  made.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.decoder = tokenizers.decoders.Metaspace()
  options = {'unk_token': '<unk>'} if kind == 'unigram' else {}
  texts = [f'Ten fives are {number}, or twelve {TEXT}' for number in range(50)]
  special = ['<pad>', '</s>', '<unk>']
  made.train_from_iterator(
    texts,
    trainer(
      vocab_size=90, special_tokens=special, show_progress=False, **options
    ),
  )
  made.add_tokens([tokenizers.AddedToken('<a>', lstrip=True)])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='$A </s>', special_tokens=[('</s>', 1)]
  )
  return made.to_str().encode()


_TOKENIZER_CONFIG = _dump(
  {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': 10**30,
    'eos_token': '</s>',
    'pad_token': {'content': '<pad>', 'lstrip': False, '__type': 'AddedToken'},
    'unk_token': '<unk>',
    'add_bos_token': False,
    'added_tokens_decoder': {
      '0': {'content': '<pad>', 'special': True, 'lstrip': False},
      '1': {'content': '</s>', 'special': True, 'lstrip': False},
    },
    'extra_special_tokens': {},
  }
)
_SPECIAL_TOKENS = _dump(
  {
    'eos_token': {'content': '</s>', 'lstrip': False, 'rstrip': False},
    'pad_token': '<pad>',
    'unk_token': '<unk>',
    'additional_special_tokens': ['<a>'],
  }
)


def kinds() -> dict[str, Kind]:
  """Returns the kinds of files, by name."""
  scores = {'bleu': 31.5, 'bleu_low': 30.1, 'bleu_high': 33.0, 'loss': 0.5}
  found = {
    'best': Kind(
      saved_steps.BEST,
      _dump({'metric': 'bleu', 'score': 31.5, 'step': 100}),
      saved_steps.best_step,
    ),
    'log': Kind(
      metric_writer.FILE,
      b''.join(
        json.dumps(
          {'step': s, 'time': 1e9 + s, 'train/loss': 1 / s, 'eval/bleu': 3}
        ).encode()
        + b'\n'
        for s in range(1, 6)
      ),
      _read_log,
      _mutate_lines,
    ),
    'scores': Kind(
      'metrics-x-test.json',
      _dump(
        {
          str(step): {
            'none': {**scores, 'settings': {'decoding': {'stop': []}}},
            'zero': scores,
          }
          for step in (100, 200)
        }
      ),
      _read_scores,
    ),
    'settings': Kind(predictions.SETTINGS, _dump(_SETTINGS), _read_settings),
    'answers': Kind(
      'predictions.jsonl.partial',
      b''.join(
        json.dumps({'prompt': f'p{n}', 'prediction': f'a{n}'}).encode() + b'\n'
        for n in range(5)
      ),
      _read_answers,
      _mutate_lines,
    ),
  }
  for ending, content in _data_files().items():
    is_json = ending in ('json', 'jsonl')
    found[f'data_{ending}'] = Kind(
      f'x.{ending}',
      content,
      _read_prompts,
      {'json': mutate.mutate_json_file, 'jsonl': _mutate_lines}[ending]
      if is_json
      else mutate.mutate_bytes,
    )
  for kind in ('bpe', 'unigram', 'wordpiece'):
    found[f'tokenizer_{kind}'] = Kind(
      'tokenizer.json', _tokenizer(kind), _read_tokenizer
    )
  tokenizer = {'tokenizer.json': _tokenizer('bpe')}
  for name, content in (
    ('tokenizer_config', _TOKENIZER_CONFIG),
    ('special_tokens_map', _SPECIAL_TOKENS),
  ):
    found[name] = Kind(
      f'{name}.json', content, _read_tokenizer, others=tokenizer
    )
  return found


# --- settings ---

_GIN_FILES = (
  'gin_configs/models/slm_baseline.gin',
  'gin_configs/tasks/parallel_text.gin',
  'gin_configs/runs/train.gin',
  'gin_configs/meshes/cpu.gin',
)
_GIN = {
  'MODEL_DIR': 'runs/x',
  'SLM_VOCABULARY': 'tiny.model',
  'DATA_FILES': "{'train': ('a', 'b')}",
  'TASK_FEATURE_LENGTHS': "{'inputs': 48, 'targets': 32}",
  'BATCH_SIZE': '8',
  'TRAIN_STEPS': '100',
  'LEARNING_RATE': '1e-3',
  'LEARNING_RATE_FACTORS': 'constant * linear_warmup',
  'LEARNING_RATE_BY_PATH': "{'projector/.*': 3.0}",
  'OPTIMIZER': '@adamw()',
  'LENGTH_BUCKETS': '((16, 24), (32, 48))',
  'PROFILE_STEPS': '(10, 12)',
  'PACK': 'True',
  'DTYPE': 'bfloat16',
  'BEST_METRIC': 'bleu',
  'MeshConfig.slm_rules': "{'embed': None}",
  'adamw.b1': '0.9',
}
_GIN_VALUES = (
  '', ' ', 'x', '@', '@x', '@x()', '@adamw', '%', '%X', '%BATCH_SIZE',
  '@train()',
  '0', '-1', '1e400', '1e-3x', '[32, 32]', '(', '"', "'''", '{', '{1: 2}', '#',
  'None', 'none', 'True', '[[]]', '{[]: 1}', 'a\nb', 'ș', '9' * 5000,
  '(' * 300 + ')' * 300, '%gin.REQUIRED', 'gin.REQUIRED', '@a/b/c()',
  'lambda: 1',
  '__import__("os")', '1 + 1', "b'x'", '1j', '...', '{}', '()', 'x=1', '\\',
  '0x',
)  # fmt: skip


def gin_cases(seed: int, count: int) -> Iterator[list[str]]:
  """Yields bindings, one of which is broken."""
  for number in range(count):
    rng = random.Random(f'gin {seed} {number}')
    name = rng.choice([*_GIN])
    if rng.random() < 0.5:
      value = rng.choice(_GIN_VALUES)
    else:
      value = mutate.mutate_bytes(_GIN[name].encode(), rng).decode(
        'utf-8', 'replace'
      )
    if rng.random() < 0.1:
      name = rng.choice(
        (name.lower(), f'{name}.x', f'x/{name}', f'{name} ', '')
      )
    value = value.replace('\x00', '')  # No command line can hold it.
    yield [f'{k}={v}' for k, v in _GIN.items()] + [f'{name}={value}']


def run_gin(bindings: Sequence[str]) -> None:
  """Reads settings as `train` does, up to where it looks at files."""
  verb = command_line.VERBS['train'].load()
  parsed = gin_config.parse_config(_GIN_FILES, bindings)
  gin_config.check_required(verb, ('dry_run',), parsed.required)
  bound = gin.get_bindings(verb, resolve_references=False)
  bound.pop('model')  # It would look for files.
  values = {
    name: value.scoped_configurable_fn()
    if isinstance(value, gin_internals.ConfigurableReference)
    else value
    for name, value in bound.items()
  }
  gin_config.check_lengths(values['task_feature_lengths'])


# --- all of them ---


def is_sentence(error: BaseException) -> bool:
  """Whether the command line prints this error without a traceback."""
  if isinstance(error, ValueError | FileNotFoundError):
    if command_line._is_deliberate(error):
      return bool(str(error).strip()) and '\x00' not in str(error)
  return os_errors.describe(error) is not None


def run(result: Result, label: str, read: Callable[[], object]) -> None:
  """Reads one broken thing, and notes what came of it."""
  said = io.StringIO()
  bounds_time = signal.getsignal(signal.SIGALRM) not in (None, signal.SIG_DFL)
  try:
    if bounds_time:
      signal.alarm(_MOST_SECS)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      read()
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:
    if is_sentence(error):
      result.num_refused += 1
      result.messages[str(error)[-60:]] += 1
    else:
      lines = traceback.format_exception(error)
      where = [line for line in lines if 'File' in line][-1].strip()
      result.tracebacks.append(
        f'{label}: {type(error).__name__}: {str(error)[:200]}\n    {where}'
      )
  else:
    result.num_read += 1
  finally:
    if bounds_time:
      signal.alarm(0)


def fuzz(name: str, kind: Kind, *, seed: int, count: int) -> Result:
  """Breaks files of a kind and reads them."""
  result = Result()
  for number in range(count):
    rng = random.Random(f'{name} {seed} {number}')
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(scratch)
      for other, content in kind.others.items():
        (folder / other).write_bytes(content)
      (folder / kind.name).write_bytes(kind.mutate(kind.content, rng))
      run(result, f'{name} {seed} {number}', lambda: kind.read(folder))  # noqa: B023
  return result


def fuzz_gin(*, seed: int, count: int) -> Result:
  """Breaks settings and reads them."""
  for module in command_line.CONFIGURABLE_MODULES:
    importlib.import_module(module)
  result = Result()
  for bindings in gin_cases(seed, count):
    run(result, repr(bindings[-1])[:100], lambda: run_gin(bindings))  # noqa: B023
  return result


def main() -> int:
  """Runs all kinds, prints a table, and returns 1 if one had a traceback."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--count', type=int, default=1000, help='of each kind')
  parser.add_argument('--kinds', default='', help='some, with commas between')
  args = parser.parse_args()
  known = kinds()
  chosen = args.kinds.split(',') if args.kinds else [*known, 'gin']
  results = {}
  print('| kind | broken | read | refused in one sentence | tracebacks |')
  print('| --- | ---: | ---: | ---: | ---: |')
  for name in chosen:
    if name == 'gin':
      results[name] = fuzz_gin(seed=args.seed, count=args.count)
    else:
      results[name] = fuzz(name, known[name], seed=args.seed, count=args.count)
    found = results[name]
    print(
      f'| {name} | {args.count} | {found.num_read} | {found.num_refused} | '
      f'{len(found.tracebacks)} |',
      flush=True,
    )
  for found in results.values():
    for text in found.tracebacks[:8]:
      print(text)
  return int(any(found.tracebacks for found in results.values()))


if __name__ == '__main__':
  sys.exit(main())
