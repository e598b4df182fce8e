# SPDX-License-Identifier: Apache-2.0
"""Optional packages, and the extra of pyproject.toml that installs each.

The core needs none of them. A function that does calls `require` before it
begins; where it does not, the command line turns Python's error of a missing
module into the same message (`explain`).
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from typing import Any

# Name of the module to extra.
EXTRAS: Mapping[str, str] = {
  'apache_beam': 'beam',
  'babel': 'quickstart',
  'ctranslate2': 'peers',
  'datasets': 'peers',
  'gcsfs': 'gcs',
  'gguf': 'gguf',
  'grain': 'peers',
  'huggingface_hub': 'hub',
  'libtpu': 'tpu',
  'num2words': 'quickstart',
  'onnx': 'onnx',
  'onnx_ir': 'onnx',
  'onnxruntime': 'onnx',
  'pyarrow': 'parquet',
  'regex': 'tasks',
  'rouge_score': 'tasks',
  's3fs': 's3',
  'sacrebleu': 'tasks',
  'seqio': 'tasks',
  'tensorflow': 'tasks',
  'tensorflow_datasets': 'tasks',
  'tensorflow_text': 'tasks',
  'torch': 'hf',
  'trackio': 'trackers',
  'transformers': 'hf',
  'wandb': 'trackers',
}


def missing(*modules: str) -> list[str]:
  """Returns those of the modules that are not installed."""
  return [name for name in modules if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
  """Hides a module from the import of another, which can do without it.

  A module that was imported before is not hidden. What is imported inside the
  block, by any thread, keeps what it found.
  """
  if module in sys.modules:
    yield
    return
  modules: dict[str, Any] = sys.modules
  modules[module] = None
  try:
    yield
  finally:
    modules.pop(module, None)


def require(purpose: str, *modules: str, instead: str = '') -> None:
  """Checks that optional modules are installed.

  Args:
    purpose: what needs them: the subject of the message.
    *modules: names, as `import` has them; keys of `EXTRAS`.
    instead: what to do without them, if anything, as a sentence.

  Raises:
    ValueError: names the missing modules and the extras that install them.
  """
  if absent := missing(*modules):
    raise ValueError(f'{message(purpose, *absent)} {instead}'.rstrip())


def message(purpose: str, *modules: str) -> str:
  """Returns the sentence about modules that are not installed."""
  extras = ','.join(sorted({EXTRAS[name] for name in modules}))
  *most, last = modules
  names = f'{", ".join(most)} and {last}' if most else last
  verb = 'are' if most else 'is'
  return (
    f'{purpose} needs {names}, which {verb} not installed: '
    f"pip install 'l2s_jax[{extras}]' (in a clone: pip install '.[{extras}]')."
  )


def explain(error: BaseException, purpose: str) -> str | None:
  """Returns the sentence about the optional module that an import misses.

  Args:
    error: of any kind; those that it came from are read, too.
    purpose: what needs the module.

  Returns:
    None if no import failed, or the module belongs to no extra.
  """
  for cause in _causes(error):
    if isinstance(cause, ModuleNotFoundError) and cause.name:
      module = cause.name.partition('.')[0]
      if module in EXTRAS and missing(module):
        return message(purpose, module)
  return None


def _causes(error: BaseException) -> Iterator[BaseException]:
  found: BaseException | None = error
  while found is not None:
    yield found
    found = found.__cause__ or found.__context__
