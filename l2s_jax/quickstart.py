# SPDX-License-Identifier: Apache-2.0
"""The whole method in minutes, from scratch: `launch/quickstart.sh`.

It trains an LLM, an SLM and LLM-to-SLM on a translation task made from CLDR,
compares the three, and writes a report to `runs/quickstart`. It prints the
commands of training and evaluation and runs them in one process, since
TensorFlow takes long to import; only the SLM baseline, which does not read the
LLM, trains beside the others. An interrupted quickstart resumes.
"""

import os
import signal

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
  # The imports take a while; until they are done, Ctrl-C exits at once.
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from l2s_jax import __main__
from l2s_jax.evaluation import evaluate, report
from l2s_jax.evaluation.report import TableRow
from l2s_jax.inference import answerer
from l2s_jax.metrics import metric_fns
from l2s_jax.performance import timing
from l2s_jax.runtime import extras, files, gin_config, partitioning
from l2s_jax.systems import parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.vocabularies import sentencepiece

PROMPT_LENGTH, ANSWER_LENGTH = 24, 20  # As in gin_configs/experiments.
MIN_COMPILE_SECS = 0.5  # Of the programs that the compile cache keeps.
VOCAB_SIZES = {'llm': 2000, 'slm': 1600}
NAMES = {
  'llm': 'LLM baseline',
  'slm': 'SLM baseline',
  'llm_to_slm': 'LLM-to-SLM',
}
CONTROLS = {
  'zero': 'LLM-to-SLM, Z = 0',
  'other': 'LLM-to-SLM, Z of another prompt',
}
COLUMNS = {
  'system': 'system',
  'bleu': 'BLEU',
  'chrf': 'chrF',
  'exact_match': 'exact match %',
  'loss': 'nats/token',
  'parameters': 'parameters',
  'trained': 'of these trained',
  'prefill_ms': 'prefill ms',
  'ms_per_token': 'ms/token',
  'total_ms': f'ms for {ANSWER_LENGTH} tokens',
  'speedup': 'speed-up over the LLM',
}
Loaded = tuple[system_lib.System, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the quickstart; `--help` lists its flags."""
  args = parse_args(argv)
  start_secs = time.perf_counter()
  output_dir = output_folder(args)
  # Training, evaluation and translation compile the same functions.
  jax.config.update('jax_compilation_cache_dir', str(output_dir / 'compiled'))
  jax.config.update(
    'jax_persistent_cache_min_compile_time_secs', MIN_COMPILE_SECS
  )

  _say('1/7 vocabularies: SentencePiece, trained on the train split')
  llm_vocabulary = _vocabulary(output_dir, 'llm')
  slm_vocabulary = llm_vocabulary
  if args.slm == 'own_vocabulary':
    slm_vocabulary = _vocabulary(output_dir, 'slm')

  slm = [f'SLM_VOCABULARY={slm_vocabulary}']
  if args.slm == 'own_vocabulary':
    slm.append('SLM=%QUICKSTART_GPT2_SLM')
  bindings = {
    'llm': [f'LLM_VOCABULARY={llm_vocabulary}'],
    'slm': slm,
    'llm_to_slm': [f'LLM_PATH={output_dir / "llm"}', *slm],
  }
  trainings = {
    name: _training(name, output_dir, values, args)
    for name, values in bindings.items()
  }
  _say(f'2/7 training: {NAMES["slm"]}')
  with _beside(trainings['slm'], output_dir):
    for number, name in enumerate(('llm', 'llm_to_slm'), start=3):
      _say(f'{number}/7 training: {NAMES[name]}')
      _run(trainings[name])

  _say('5/7 evaluation on the test split, with the controls')
  rows: dict[str, TableRow] = {}
  for name, label in NAMES.items():
    rows |= _evaluate(name, label, output_dir / name, args.eval_examples)

  mesh = partitioning.make_mesh(partitioning.MeshConfig())
  with (
    partitioning.use_mesh(mesh),
    partitioning.axis_rules(partitioning.DEFAULT_RULES),
  ):
    loaded = {name: _load(output_dir / name, mesh) for name in NAMES}
    _say('6/7 speed: batch 1, the three in turn')
    _time(rows, loaded)
    _say('7/7 five phrases that no model has seen')
    phrases = _translate(loaded, mesh)

  verdict = report.describe_controls({'none': rows['llm_to_slm']} | rows)
  minutes = (time.perf_counter() - start_secs) / 60
  _write_report(
    output_dir, list(rows.values()), phrases, verdict, minutes, args.dtype
  )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  """Returns the command line's flags."""
  parser = argparse.ArgumentParser(
    # `launch/quickstart.sh` is in a clone alone.
    'python -m l2s_jax.quickstart',
    description='Trains and compares an LLM, an SLM and LLM-to-SLM.',
  )
  parser.add_argument(
    '--slm',
    choices=('shared_vocabulary', 'own_vocabulary'),
    default='shared_vocabulary',
    help="one decoder layer with the LLM's vocabulary, or two of GPT-2's kind "
    'with their own (default: %(default)s)',
  )
  parser.add_argument(
    '--output_dir',
    type=pathlib.Path,
    default=pathlib.Path('runs', 'quickstart'),
    help='where everything goes; `_own_vocabulary`, `_bfloat16`, a --seed '
    'above 0 and the number of --train_steps are appended '
    '(default: %(default)s)',
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    help='of all three trainings (default: %(default)s)',
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    default='float32',
    help='of activations and of the frozen LLM (default: %(default)s)',
  )
  parser.add_argument(
    '--train_steps',
    type=int,
    help='updates of each model, to walk the path in less time',
  )
  parser.add_argument(
    '--eval_examples',
    type=int,
    help='phrases of each evaluation, to evaluate in less time',
  )
  args = parser.parse_args(argv)
  if absent := extras.missing('babel', 'num2words', 'sacrebleu', 'seqio'):
    parser.error(extras.message('the quickstart', *absent))
  return args


def output_folder(args: argparse.Namespace) -> pathlib.Path:
  """Returns the output folder for these flags, made if absent."""
  output_dir = args.output_dir
  if args.slm == 'own_vocabulary':
    output_dir = output_dir.with_name(output_dir.name + '_own_vocabulary')
  if args.dtype != 'float32':
    output_dir = output_dir.with_name(f'{output_dir.name}_{args.dtype}')
  if args.seed:
    output_dir = output_dir.with_name(f'{output_dir.name}_seed{args.seed}')
  if args.eval_examples is not None:
    gin_config.check_positive(eval_examples=args.eval_examples)
    output_dir = output_dir.with_name(
      f'{output_dir.name}_{args.eval_examples}_phrases'
    )
  if args.train_steps is not None:
    gin_config.check_positive(train_steps=args.train_steps)
    output_dir = output_dir.with_name(f'{output_dir.name}_{args.train_steps}')
  output_dir.mkdir(parents=True, exist_ok=True)
  return output_dir


def _say(text: str) -> None:
  """Prints the title of a stage."""
  print(f'\n== {text}', flush=True)


def _vocabulary(output_dir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns a SentencePiece model of the train split, trained if absent."""
  from l2s_jax.data import cldr

  path = output_dir / f'{name}_vocabulary.model'
  if not path.is_file():
    texts = (
      text
      for example in cldr.examples('train', num_examples=24_000)
      for text in (example['prompt'], example['answer'])
    )
    # BPE makes shorter prompts of these texts than unigram pieces: 13 tokens,
    # not 17.
    # Digits as single pieces: unseen numbers can then be copied.
    sentencepiece.train(
      texts,
      path,
      vocab_size=VOCAB_SIZES[name],
      model_type='bpe',
      split_digits=True,
      character_coverage=1.0,
    )
  print(f'{path}: {VOCAB_SIZES[name]} pieces')
  return path


def _training(
  name: str,
  output_dir: pathlib.Path,
  bindings: Sequence[str],
  args: argparse.Namespace,
) -> list[str]:
  """Returns the arguments of the command that trains one of the three."""
  bindings = [f'MODEL_DIR={output_dir / name}', *bindings, f'SEED={args.seed}']
  if args.dtype != 'float32':
    bindings += [f'DTYPE={args.dtype}']
    if name == 'llm_to_slm':
      bindings += [f'LLM_DTYPE={args.dtype}']
  if args.train_steps is not None:
    warmup_steps = min(max(args.train_steps // 10, 1), args.train_steps - 1)
    bindings += [
      f'TRAIN_STEPS={args.train_steps}',
      f'WARMUP_STEPS={warmup_steps}',
    ]
  if args.eval_examples is not None:
    bindings += [f'train.num_eval_examples={args.eval_examples}']
  gin_file = f'gin_configs/experiments/quickstart_{name}.gin'
  return _arguments('train', [gin_file], bindings)


def _arguments(
  verb: str, gin_files: Sequence[str], bindings: Sequence[str]
) -> list[str]:
  """Returns the arguments of a command."""
  return [
    verb,
    *(f'--gin_file={file}' for file in gin_files),
    *(f'--gin.{binding}' for binding in bindings),
  ]


def _run(arguments: list[str]) -> None:
  """Prints a command and runs it in this process."""
  print(_command(arguments), flush=True)
  status = __main__.main(arguments)
  if status:
    sys.exit(status)


def _command(arguments: list[str]) -> str:
  """Returns a command as a shell reads it."""
  return shlex.join(['python', '-m', 'l2s_jax', *arguments])


@contextlib.contextmanager
def _beside(arguments: list[str], output_dir: pathlib.Path) -> Iterator[None]:
  """Runs a command in a second process while the body runs.

  The command gets one core. Accelerators, and machines with one core, run it
  in this process before the body.

  Args:
    arguments: arguments of the command.
    output_dir: folder of the compile cache, and of the second process's output,
      `slm.log`.
  """
  if jax.default_backend() != 'cpu' or (os.cpu_count() or 1) < 2:
    _run(arguments)
    yield
    return
  log_file = output_dir / 'slm.log'
  print(f'{_command(arguments)}\nruns beside the next; output: {log_file}')
  sys.stdout.flush()
  one_core = '--xla_cpu_multi_thread_eigen=false'
  with log_file.open('ab') as log:
    process = subprocess.Popen(
      [sys.executable, '-m', 'l2s_jax', *arguments],
      env=os.environ
      | {
        'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {one_core}'.strip(),
        'JAX_COMPILATION_CACHE_DIR': str(output_dir / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': str(MIN_COMPILE_SECS),
      },
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
    )
  try:
    yield
    status = process.wait()
  finally:
    process.terminate()
    process.wait()
  if status:
    print(log_file.read_text(encoding='utf-8')[-2000:], file=sys.stderr)
    sys.exit(status)


def _evaluate(
  name: str, label: str, run_dir: pathlib.Path, num_examples: int | None
) -> dict[str, TableRow]:
  """Evaluates a run; returns its table row and those of its controls."""
  labels = {'none': label} | (CONTROLS if name == 'llm_to_slm' else {})
  _run(
    _arguments(
      'evaluate',
      ['gin_configs/tasks/cldr.gin', 'gin_configs/runs/evaluate.gin'],
      [
        f'CHECKPOINT_PATH={run_dir}',
        'EVAL_SPLIT=test',
        f'EVAL_CONTROLS={tuple(labels)}',
        f"TASK_FEATURE_LENGTHS={{'inputs': {PROMPT_LENGTH}, "
        f"'targets': {ANSWER_LENGTH}}}",
        'BATCH_SIZE=32',
        f'evaluate.num_examples={num_examples}',
      ],
    )
  )
  results = evaluate.read_scores(run_dir / 'eval' / 'metrics-cldr-test.json')
  by_control = results[max(results, key=int)]
  return {
    name if control == 'none' else control: {
      'system': labels[control],
      **scores,
    }
    for control, scores in by_control.items()
  }


def _load(run_dir: pathlib.Path, mesh: jax.sharding.Mesh) -> Loaded:
  """Returns the system of a run and its parameters."""
  system = run_folder.load(run_dir)
  layout = parameters.layout(system, mesh, partitioning.MeshConfig())
  return system, parameters.load_params(system, layout, run_dir)


def _time(rows: dict[str, TableRow], loaded: Mapping[str, Loaded]) -> None:
  """Adds sizes and timings to the rows of the three systems."""
  from l2s_jax.data import cldr

  example = next(cldr.examples('test', num_examples=1))
  timings = timing.time_generation(
    loaded,
    [example['prompt']],
    prompt_length=PROMPT_LENGTH,
    num_tokens=ANSWER_LENGTH,
    rounds=15,
  )
  for name, found in timings.items():
    system, params = loaded[name]
    rows[name] |= {
      'parameters': parameters.num_params(params),
      'trained': parameters.num_params(
        parameters.split(params, system.frozen)[1]
      ),
      'prefill_ms': found.prefill_ms,
      'ms_per_token': found.ms_per_token,
      'total_ms': found.total_ms,
      'speedup': timings['llm'].total_ms / found.total_ms,
    }
    print(
      f'{NAMES[name]}: prefill {found.prefill_ms:.2f} ms, '
      f'{found.ms_per_token:.3f} ms per token'
    )


def _translate(
  loaded: Mapping[str, Loaded], mesh: jax.sharding.Mesh
) -> list[dict[str, str]]:
  """Prints and returns each system's translations of five test phrases."""
  from l2s_jax.data import cldr

  kinds = ('date', 'cardinal', 'relative', 'currency', 'countries')
  candidates = list(cldr.examples('test'))
  chosen = [
    next(example for example in candidates if example['kind'] == kind)
    for kind in kinds
  ]
  prompts = [example['prompt'] for example in chosen]
  answers = {
    name: answerer.PromptAnswerer(
      system,
      params,
      mesh,
      prompt_length=PROMPT_LENGTH,
      max_decode_len=ANSWER_LENGTH,
      batch_size=mesh.size * len(prompts),
    )(prompts)
    for name, (system, params) in loaded.items()
  }
  phrases = []
  for index, example in enumerate(chosen):
    phrase = {'prompt': example['prompt'], 'reference': example['answer']}
    phrase |= {NAMES[name]: answers[name][index] for name in loaded}
    phrases.append(phrase)
    width = max(map(len, phrase))
    for name, text in phrase.items():
      print(f'  {name:{width}}  {text}')
    print()
  return phrases


def _write_report(
  output_dir: pathlib.Path,
  rows: list[TableRow],
  phrases: list[dict[str, str]],
  verdict: str,
  minutes: float,
  dtype: str,
) -> None:
  """Writes `results.json`, `results.md` and `results.png`; prints the table."""
  versions = {
    'python': platform.python_version(),
    'jax': jax.__version__,
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'cpu_cores': os.cpu_count(),
    'bleu': metric_fns.bleu_signature(),
    'chrf': metric_fns.chrf_signature(),
  }
  files.write_json(
    output_dir / 'results.json',
    {
      'rows': rows,
      'phrases': phrases,
      'verdict': verdict,
      'minutes': minutes,
      'versions': versions,
    },
  )
  table = report.markdown_table(rows, COLUMNS)
  answers = report.markdown_table(phrases, {key: key for key in phrases[0]})
  text = (
    f'# Quickstart\n\n{table}\n{verdict}\n\n'
    f'Test split of `cldr`, {rows[0]["num_examples"]:.0f} examples; speed at '
    f'batch 1, {PROMPT_LENGTH} prompt tokens, {dtype}. '
    f'{minutes:.1f} minutes in all.\n\n{answers}\n'
    + ''.join(f'- {name}: {value}\n' for name, value in versions.items())
  )
  (output_dir / 'results.md').write_text(text, encoding='utf-8')
  report.plot_quality_against_speed(
    [row for row in rows if 'total_ms' in row],
    output_dir / 'results.png',
    quality='bleu',
    quality_label='BLEU, test split',
    speed='total_ms',
    speed_label=f'ms for {ANSWER_LENGTH} tokens, batch 1',
    title='Quality against speed',
  )
  print(f'{table}\n{verdict}\n\n{minutes:.1f} minutes; see {output_dir}')


if __name__ == '__main__':
  sys.exit(__main__.process(main))
