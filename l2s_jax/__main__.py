# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m l2s_jax VERB --gin_file=FILE ...`.

A verb is a gin configurable, called as `fn(dry_run=...)` after gin files and
`--gin.NAME=VALUE` bindings are parsed and checked. Large packages are imported
only after the command line is parsed.
"""

import os
import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
  # Imports take seconds; until they are done, Ctrl-C exits at once.
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import gc
import importlib
import inspect
import keyword
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gin

import l2s_jax
from l2s_jax.runtime import (
  compilation,
  console,
  extras,
  gin_config,
  memory,
  os_errors,
  preemption,
  t5x_names,
)


class Flag(NamedTuple):
  """A flag of one verb: a parameter of its function, which overrides gin.

  Attributes:
    name: name of the flag; an uppercase name is a positional argument.
    type: type of the value; a flag of type bool takes no value.
    help: help text.
    choices: allowed values; None allows all.
    required: whether the verb requires the flag.
    is_repeated: whether a positional argument takes several values.
  """

  name: str
  type: Callable[[str], Any]
  help: str
  choices: Sequence[str] | None = None
  required: bool = False
  is_repeated: bool = False

  @property
  def parameter(self) -> str:
    """The function's parameter; a Python keyword gets a `_`, as in `from_`."""
    name = self.name.lower()
    return f'{name}_' if keyword.iskeyword(name) else name

  @property
  def usage(self) -> str:
    if self.name.isupper():
      more = f' [{self.name} ...]' if self.is_repeated else ''
      return f'{self.name}{more}'
    value = '|'.join(self.choices) if self.choices else self.metavar
    text = f'--{self.name}' + ('' if self.type is bool else f'={value}')
    return text if self.required else f'[{text}]'

  @property
  def metavar(self) -> str:
    return 'N' if self.type is int else self.name.upper()

  def add_to(self, parser: argparse.ArgumentParser) -> None:
    if self.name.isupper():
      parser.add_argument(
        self.parameter,
        metavar=self.name,
        nargs='+' if self.is_repeated else None,
        help=self.help,
      )
    elif self.type is bool:
      parser.add_argument(
        f'--{self.name}', action='store_true', default=None, help=self.help
      )
    else:
      parser.add_argument(
        f'--{self.name}',
        dest=self.parameter,
        metavar=None if self.choices else self.metavar,
        type=gin_config.expand_home if self.type is str else self.type,
        choices=self.choices,
        required=self.required,
        help=self.help,
      )


class Verb(NamedTuple):
  """A verb of the command line; its module is imported when it runs.

  Attributes:
    module: module of the function.
    function: name of the function.
    summary: one line for `--help`.
    example: arguments of an example for `--help`.
    flags: flags in addition to those of all verbs.
    joins: whether several processes can run it as one distributed job.
    gin_file: gin file that is read before those of the command line.
  """

  module: str
  function: str
  summary: str
  example: str
  flags: Sequence[Flag] = ()
  joins: bool = False
  gin_file: str | None = None

  @property
  def is_all_flags(self) -> bool:
    """Whether flags alone configure the verb, without a gin file."""
    return any(flag.required for flag in self.flags)

  def load(self) -> Callable[..., Any]:
    return getattr(importlib.import_module(self.module), self.function)


VERBS: Mapping[str, Verb] = {
  'train': Verb(
    'l2s_jax.training.train',
    'train',
    'trains LLM-to-SLM, or an LLM or SLM baseline; resumes an earlier run',
    '--gin_file=gin_configs/experiments/multi30k.gin '
    '--gin.DATA_DIR=data/multi30k --gin.SLM_VOCABULARY=vocabulary.model '
    '--gin.LLM_PATH=runs/multi30k_llm --gin.MODEL_DIR=runs/multi30k',
    joins=True,
  ),
  'evaluate': Verb(
    'l2s_jax.evaluation.evaluate',
    'evaluate',
    'evaluates checkpoints of a run; writes metrics and predictions',
    '--gin_file=gin_configs/tasks/multi30k_bare.gin '
    '--gin_file=gin_configs/runs/evaluate.gin '
    '--gin.DATA_DIR=data/multi30k --gin.CHECKPOINT_PATH=runs/multi30k',
    joins=True,
  ),
  'infer': Verb(
    'l2s_jax.inference.infer',
    'infer',
    'answers prompts of a file, a task, or stdin (-); restartable',
    '--gin_file=gin_configs/runs/infer.gin '
    '--gin.CHECKPOINT_PATH=runs/multi30k --gin.INPUT=prompts.txt '
    '--gin.INFER_OUTPUT_DIR=answers --shard=0 --num_shards=4',
    (
      Flag('shard', int, 'index of the shard of the input to answer, from 0'),
      Flag('num_shards', int, 'number of shards of the input'),
    ),
    joins=True,
  ),
  'distill': Verb(
    'l2s_jax.inference.distill',
    'distill',
    "answers a task's training prompts with a teacher; restartable",
    '--gin_file=gin_configs/tasks/multi30k_bare.gin '
    '--gin_file=gin_configs/runs/distill.gin --gin.DATA_DIR=data/multi30k '
    '--gin.CHECKPOINT_PATH=runs/multi30k_llm '
    '--gin.DISTILL_DIR=distilled/multi30k --shard=0 --num_shards=4',
    (
      Flag('shard', int, 'index of the shard of the prompts to answer, from 0'),
      Flag('num_shards', int, 'number of shards of the prompts'),
    ),
    joins=True,
  ),
  'cache': Verb(
    'l2s_jax.caching.cache_command',
    'cache',
    'tokenizes a task into files for train and evaluate; restartable',
    '--gin_file=gin_configs/experiments/multi30k.gin '
    '--gin.DATA_DIR=data/multi30k --gin.SLM_VOCABULARY=vocabulary.model '
    '--gin.LLM_PATH=runs/multi30k_llm --gin.CACHE_DIR=caches/multi30k',
    (
      Flag('shard', int, 'index of the shard of the work, from 0'),
      Flag('num_shards', int, 'number of shards of the work'),
      Flag('show', int, 'print the first N examples of a cache'),
      Flag('features', bool, "also cache the frozen LLM's last states"),
      Flag(
        'beam_pipeline_options',
        str,
        'run on Apache Beam: --runner=DataflowRunner,--project=mine',
      ),
    ),
    joins=True,
    gin_file='gin_configs/runs/cache.gin',
  ),
  'benchmark': Verb(
    'l2s_jax.performance.benchmark',
    'benchmark',
    'times LLM, SLM and LLM-to-SLM; --peers adds other engines',
    '--gin_file=gin_configs/models/t5_large.gin '
    '--gin_file=gin_configs/models/t5_small.gin '
    '--gin_file=gin_configs/runs/benchmark.gin '
    '--gin.LLM=%T5_LARGE --gin.SLM=%T5_SMALL --peers',
    (
      Flag('peers', bool, 'also time other engines'),
      Flag('train', bool, 'time training steps instead of generation'),
      Flag('data', bool, 'time tokenization and reading instead of generation'),
      Flag('quick', bool, 'time the first shape alone, in three rounds'),
    ),
  ),
  'report': Verb(
    'l2s_jax.evaluation.report_command',
    'report',
    'compares runs: tables, plots, significance, differing settings',
    'runs/llm runs/slm runs/llm_to_slm --output=reports/mine '
    '--speed=runs/benchmark/benchmark.json',
    (
      Flag(
        'RUN',
        str,
        'MODEL_DIR of train, or EVAL_OUTPUT_DIR of evaluate',
        is_repeated=True,
      ),
      Flag(
        'output',
        str,
        'folder of report.md and its plots',
        required=True,
      ),
      Flag('speed', str, 'benchmark.json of these systems'),
    ),
  ),
  'precompile': Verb(
    'l2s_jax.performance.pods.precompile',
    'precompile',
    'compiles for absent TPUs: memory, collectives, time bounds',
    '--gin_file=gin_configs/models/t5_1_1_xl.gin '
    '--gin_file=gin_configs/models/t5_1_1_small.gin '
    '--gin_file=gin_configs/meshes/data_fsdp_tensor.gin '
    '--gin_file=gin_configs/runs/precompile.gin '
    '--gin.LLM=%T5_1_1_XL --gin.SLM=%T5_1_1_SMALL '
    '--topology=v5e:2x4 --gin.FSDP=8 --gin.TENSOR=1',
    (
      Flag(
        'topology', str, 'TPU type and chips: v5e:2x4, v6e:16x16, v5p:4x4x4'
      ),
    ),
  ),
  'convert': Verb(
    'l2s_jax.interop.convert',
    'convert',
    'converts weights from Hugging Face, T5X, GGUF; to Hugging Face, T5X',
    'downloads/flan-t5-xxl weights/flan-t5-xxl '
    '--from=hf --to=l2s --dtype=bfloat16',
    (
      Flag(
        'from',
        str,
        'format of SOURCE; l2s is a run or a converted folder',
        ('hf', 't5x', 'gguf', 'l2s'),
        required=True,
      ),
      Flag(
        'to', str, 'format of DESTINATION', ('l2s', 'hf', 't5x', 'run'), True
      ),
      Flag(
        'SOURCE',
        str,
        'a folder, a file, a repository on the Hub, or gs://..., s3://...',
      ),
      Flag('DESTINATION', str, 'a new folder, or gs://..., s3://...'),
      Flag(
        'dtype',
        str,
        'dtype to store; default: as in SOURCE',
        ('float32', 'bfloat16'),
      ),
      Flag('step', int, 'step of a run; default: the newest'),
      Flag(
        'config',
        str,
        'preset (t5_1_1_small) for a T5X checkpoint without a config',
      ),
      Flag('vocabulary', str, 'tokenizer, for a SOURCE without one'),
      Flag('verify', bool, 'compare logits with those of transformers'),
      Flag('allow_non_finite', bool, 'accept NaN and infinity in weights'),
      Flag('run', str, "for --to=run: the run from which T5X's model was made"),
    ),
  ),
  'export': Verb(
    'l2s_jax.interop.exports.export_command',
    'export',
    'exports a run as a self-contained folder; compares it with the run',
    'runs/multi30k exports/multi30k --to=bundle --step=best',
    (
      Flag(
        'to',
        str,
        'format of DESTINATION',
        ('bundle', 'gguf', 'hf', 'onnx', 'savedmodel', 'stablehlo', 't5x'),
        True,
      ),
      Flag('SOURCE', str, 'a run, a bundle, or a pretrained model'),
      Flag('DESTINATION', str, 'a new folder, or gs://..., s3://...'),
      Flag('step', str, 'step of a run: N or best; default: the newest'),
      Flag(
        'dtype',
        str,
        'dtype to store; default: as in SOURCE',
        ('float32', 'bfloat16'),
      ),
      Flag(
        'quantization',
        str,
        'int8 kernels, for bundle and onnx; default: floats',
        ('int8',),
      ),
      Flag('prompts', str, 'text file with a prompt per line, to compare on'),
      Flag('license', str, 'license of the weights, for the manifest'),
      Flag('llm_path', str, 'LLM_PATH, if the LLM has moved'),
      Flag('vocabulary', str, 'tokenizer, for a SOURCE without one'),
      Flag('extra_ids', int, 'EXTRA_IDS of that tokenizer'),
    ),
  ),
}

# Modules of configurables that every verb can bind, so that one experiment file
# serves all verbs. None of them imports TensorFlow.
CONFIGURABLE_MODULES = (
  'l2s_jax.runtime.integrity',
  'l2s_jax.runtime.partitioning',
  'l2s_jax.models.config',
  'l2s_jax.weights.finite',
  'l2s_jax.systems.system',
  'l2s_jax.systems.builders',
  'l2s_jax.training.optim',
  'l2s_jax.data.tasks',
  'l2s_jax.caching.cache_command',
  'l2s_jax.training.train',
  'l2s_jax.evaluation.evaluate',
  'l2s_jax.evaluation.report_command',
  'l2s_jax.inference.infer',
  'l2s_jax.inference.distill',
  'l2s_jax.performance.benchmark',
  'l2s_jax.performance.pods.precompile',
  'l2s_jax.interop.convert',
  'l2s_jax.interop.exports.export_command',
)

_GIN_USAGE = (
  '--gin_file=FILE [--gin_file=FILE ...]',
  '[--gin.NAME=VALUE ...]',
  '[--gin_search_paths=DIRS]',
  '[--tfds_data_dir=DIR]',
)
_GIN_HELP = (
  '\n\n--gin.NAME=VALUE binds a macro (--gin.TRAIN_STEPS=10) or a parameter,\n'
  'over the gin files. A VALUE that gin cannot parse is a string; in paths\n'
  '`~/` is the home folder.'
)


def main(
  argv: Sequence[str] | None = None,
  *,
  verbs: Mapping[str, Verb] = VERBS,
  configurable_modules: Sequence[str] = CONFIGURABLE_MODULES,
) -> int:
  """Runs one verb and returns the exit status.

  Returns:
    0: success; 1: a loss that is not finite, or an error of the operating
    system; 2: invalid input; 75: stopped by SIGTERM; 130: stopped by Ctrl-C.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ('-h', '--help'):
    print(_overview(verbs))
    return 0 if argv else 2
  if argv == ['--version']:
    print(f'l2s_jax {l2s_jax.__version__}')
    return 0
  name = argv[0]
  if name not in verbs:
    return _refuse(
      f'{name!r} is not a verb{gin_config.near_misses(name, verbs)} '
      f'Verbs: {", ".join(verbs)}.'
    )
  parser = _parser(name, verbs[name])
  if not {'-h', '--help'}.isdisjoint(argv[1:]):
    print(parser.format_help() + _gin_help(name, verbs[name]))
    return 0
  args, bindings = _parse_args(parser, argv[1:], verbs[name].is_all_flags)
  compilation.use_cache()
  if name == 'train' or getattr(args, 'train', False):
    # Every step allocates the same. Here, before the threads of JAX start.
    memory.keep_freed()
  # TensorFlow reads this at import. 1 logs warnings and errors, 2 errors only.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1' if args.verbose else '2')
  if args.verbose:
    logging.basicConfig(level=logging.INFO)
  else:
    logging.getLogger('absl').setLevel(logging.ERROR)
  try:
    together = contextlib.nullcontext
    if verbs[name].joins:
      # Imported here: SIGTERM must be handled before the import of JAX.
      distributed = importlib.import_module('l2s_jax.runtime.distributed')
      distributed.initialize()
      together = distributed.together
    fn = verbs[name].load()
    for module in configurable_modules:
      importlib.import_module(module)
    given = {
      flag.parameter: getattr(args, flag.parameter)
      for flag in verbs[name].flags
      if getattr(args, flag.parameter) is not None
    }
    others = [
      verb.load()
      for key, verb in verbs.items()
      if key != name and not verb.is_all_flags
    ]
    _begin_collecting()
    with together():
      _run(fn, args, bindings, given, others)
  except (ValueError, FileNotFoundError) as error:
    if args.verbose:
      raise
    if _is_deliberate(error):
      return _refuse(_own_words(error))
    if isinstance(error, FileNotFoundError):
      return _refuse(os_errors.describe(error) or _own_words(error))
    raise
  except ImportError as error:
    explanation = extras.explain(error, name)
    if args.verbose or explanation is None:
      raise
    return _refuse(explanation)
  except FloatingPointError as error:
    if args.verbose or not _is_deliberate(error):
      raise
    return _refuse(_own_words(error), status=1)
  return 0


def _begin_collecting() -> None:
  """Turns the garbage collector on, which `process` turned off for imports.

  What was imported stays; looking through it is a tenth of a start.
  """
  if not gc.isenabled():
    gc.freeze()
    gc.enable()


def _run(
  fn: Callable[..., Any],
  args: argparse.Namespace,
  bindings: Sequence[str],
  given: Mapping[str, Any],
  others: Sequence[Callable[..., Any]],
) -> None:
  """Configures gin, checks the required parameters of `fn`, and calls it."""
  parsed = gin_config.parse_config(
    args.gin_file, bindings, args.gin_search_paths
  )
  gin_config.check_required(fn, ('dry_run', *given), parsed.required, others)
  if args.dry_run:
    for macro, value in parsed.assumed_strings.items():
      print(f'# {macro}={value} was taken as a string')
    print(gin_config.config())
    for macro, source in parsed.unread_macros.items():
      ours = t5x_names.answer(macro, t5x_names.MACROS)
      print(f'# {source}: nothing reads {macro}.{ours}')
  fn(dry_run=args.dry_run, **given)


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f'{console.name()} {name}',
    usage=_usage(name, verb),
    description=f'{name}: {verb.summary}.'
    + ('' if verb.is_all_flags else _GIN_HELP),
    epilog='example:\n  '
    + f'{console.name()} {name} {verb.example}'.replace(' --', ' \\\n    --'),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    add_help=False,
  )
  parser.add_argument(
    '--gin_file',
    metavar='FILE',
    action='append',
    default=[] if verb.gin_file is None else [verb.gin_file],
    help='repeatable; later files override earlier ones. Searched in the '
    'working directory, the search paths, the installed package',
  )
  parser.add_argument(
    '--gin_search_paths',
    metavar='DIRS',
    type=lambda dirs: dirs.split(','),
    default=[],
    help='search paths of gin files, separated by commas',
  )
  parser.add_argument(
    '--tfds_data_dir',
    metavar='DIR',
    help='folder of the TFDS datasets of all tasks; overrides DATA_DIR',
  )
  for flag in verb.flags:
    flag.add_to(parser)
  parser.add_argument(
    '--dry_run',
    action='store_true',
    help='print config, sizes and shardings, and exit',
  )
  parser.add_argument(
    '--verbose',
    action='store_true',
    help='show logs of libraries, and tracebacks of all errors',
  )
  parser.add_argument(
    '-h', '--help', action='store_true', help='show this text'
  )
  return parser


def _usage(name: str, verb: Verb) -> str:
  words = [
    *(() if verb.is_all_flags else _GIN_USAGE),
    *(flag.usage for flag in verb.flags),
    '[--dry_run]',
    '[--verbose]',
  ]
  lines = [f'{console.name()} {name}']
  for word in words:
    if len(lines[-1]) + len(word) > 78:
      lines.append(' ' * 8)
    lines[-1] += f' {word}'
  return '\n'.join(lines)


def _parse_args(
  parser: argparse.ArgumentParser,
  argv: Sequence[str],
  is_all_flags: bool = False,
) -> tuple[argparse.Namespace, list[str]]:
  """Returns the flags, and NAME=VALUE of each `--gin.NAME=VALUE`."""
  bindings = [
    arg.removeprefix('--gin.') for arg in argv if arg.startswith('--gin.')
  ]
  flags = [arg for arg in argv if not arg.startswith('--gin.')]
  args, unknown = parser.parse_known_args(flags)
  for binding in bindings if unknown else ():
    if '=' not in binding:
      parser.error(
        f'--gin.{binding} {unknown[0]}: write it in one word: '
        f'--gin.{binding}={unknown[0]}.'
      )
  for arg in unknown:
    name = arg.partition('=')[0]
    if re.fullmatch('-*[A-Z][A-Z0-9_]*', name):
      parser.error(
        f'{arg} is not a flag; a gin macro is set by '
        f'--gin.{name.lstrip("-")}=VALUE.'
      )
    known = [f'--{flag.rstrip("_")}' for flag in vars(args)]
    theirs = t5x_names.answer(name.lstrip('-'), t5x_names.FLAGS)
    near = gin_config.near_misses(name, known)
    if theirs:
      near = f'.{theirs}'
    elif arg.endswith('.gin'):
      near = f'; each gin file has a flag of its own: --gin_file={arg}.'
    elif near == '.' and not is_all_flags:
      near = '; settings are set by --gin.NAME=VALUE (see --help).'
    parser.error(f'{arg} is not a flag{near}')
  if args.tfds_data_dir is not None:
    bindings.append(f'tfds.data_dir={args.tfds_data_dir!r}')
  return args, bindings


def _overview(verbs: Mapping[str, Verb]) -> str:
  width = max(len(name) for name in verbs)
  lines = [f'  {name:{width}}  {verb.summary}' for name, verb in verbs.items()]
  program = console.name()
  return '\n'.join(
    [
      f'usage: {program} VERB [--gin_file=FILE ...] [--gin.NAME=VALUE ...]',
      '',
      'verbs:',
      *lines,
      '',
      f'{program} VERB --help: an example, and the gin names it reads.',
      f'{program} --version: the version.',
    ]
  )


def _gin_help(name: str, verb: Verb) -> str:
  """Returns the parameters of a verb, for its `--help`."""
  fn = verb.load()
  lines = [f'\ngin names of {name} (--gin.{name}.NAME=VALUE, or in a file):']
  for parameter in inspect.signature(fn).parameters.values():
    if parameter.name == 'dry_run':
      continue
    if parameter.default is gin.REQUIRED:
      parameter = parameter.replace(default=parameter.empty)
    lines.append(f'  {parameter}')
  if verb.is_all_flags:
    lines = []
  return '\n'.join([*lines, '', inspect.getdoc(fn) or ''])


def _is_deliberate(error: Exception) -> bool:
  """Returns whether this package raised the error, with a message for users.

  A ValueError raised by a library is a bug and keeps its traceback.
  """
  frame = traceback.extract_tb(error.__traceback__)[-1]
  package = pathlib.Path(__file__).resolve().parent
  # JAX removes its own frames from tracebacks, so the last frame can be ours
  # although JAX raised the error.
  return pathlib.Path(frame.filename).is_relative_to(package) and (
    frame.line or ''
  ).startswith('raise')


def _own_words(error: Exception) -> str:
  """Returns the message without the names of configurables that gin appends."""
  return re.sub('\n  In call to configurable .*', '', str(error))


def _refuse(message: str, status: int = 2) -> int:
  print(f'l2s_jax: error: {message}', file=sys.stderr)
  return status


def process(main: Callable[[], int | None]) -> int:
  """Runs the program of a process.

  The garbage collector is off until `main` turns it on.

  Returns:
    The exit status: 1 after an error of the operating system, which is printed
    as one sentence; 75 after SIGTERM (start again); 130 after Ctrl-C.
  """
  hooks = os_errors.Hooks()
  if '--verbose' not in sys.argv:
    hooks.install()
  gc.disable()
  status = preemption.run(main)
  sys.stdout.flush()  # Here, where a closed pipe can be reported.
  if hooks.of_thread and not status:
    status = _refuse(hooks.of_thread, status=1)
  return status


if __name__ == '__main__':
  sys.exit(process(main))
