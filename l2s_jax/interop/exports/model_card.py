# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported folder: description, usage and results.

Results come from the bundle, which has those of the run's evaluations.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.evaluation import report, run_records
from l2s_jax.interop.exports import comparing
from l2s_jax.models import l2s
from l2s_jax.models import shapes as shapes_lib
from l2s_jax.systems import system as system_lib

# Result of an evaluation: `task` (its name and split), `step` and `scores`.
Result = dict[str, Any]

_PAPER = 'arXiv:2402.16844'


def measured(run_dir: pathlib.Path) -> list[Result]:
  """Returns the evaluation results of a run, without those of control prompts.

  Args:
    run_dir: a run, or the folder of an evaluation; other folders have no
      results.

  Raises:
    ValueError: if a file of results is damaged.
  """
  if not any((run_dir / 'eval').glob('metrics-*.json')):
    return []
  (run,) = run_records.read_all([str(run_dir)])
  return [
    {
      'task': name,
      'step': found.step,
      'scores': {
        score: found.by_control['none'][score]
        for score in report.score_names(found.by_control['none'])
      },
    }
    for name, found in run.evaluations.items()
  ]


def text(
  bundle: comparing.Exportable,
  *,
  examples: Sequence[str],
  library: str = 'transformers',
) -> str:
  """Returns the model card in Markdown.

  Args:
    bundle: the exported model; its manifest may have results and a license.
    examples: Python programs that use the folder.
    library: `library_name` for model hubs.
  """
  system = bundle.system
  facts = bundle.content.get('facts', {})
  found: list[Result] = facts.get('results') or []
  license_name: str | None = facts.get('license')
  is_pair = isinstance(system.module, l2s.LlmToSlm)
  title = 'LLM-to-SLM' if is_pair else 'A language model'
  sections = [
    _front_matter(found, license_name, is_pair, library),
    f'# {title}, exported by l2s_jax',
    _description(system),
    '## How to use it',
    *(f'```python\n{example}\n```' for example in examples),
    *([_beams()] if library == 'transformers' else []),
    '## Results',
    _results(found),
    '## License',
    license_name
    or 'See `license` in manifest.json; null means that none was given. The '
    'terms of the original models and training data apply to the weights.',
  ]
  return '\n\n'.join(sections) + '\n'


def _front_matter(
  found: Sequence[Result], license_name: str | None, is_pair: bool, library: str
) -> str:
  """Returns the YAML header for model hubs, with JSON values (valid YAML)."""
  content: dict[str, Any] = {'library_name': library}
  if license_name is not None:
    content['license'] = license_name
  content['tags'] = ['l2s_jax', *(['llm-to-slm'] if is_pair else [])]
  if found:
    content['model-index'] = [
      {
        'name': 'l2s_jax',
        'results': [
          {
            'task': {'type': 'text-generation'},
            'dataset': {'name': result['task'], 'type': result['task']},
            'metrics': [
              {'type': name, 'value': value}
              for name, value in result['scores'].items()
            ],
          }
          for result in found
        ],
      }
    ]
  lines = [f'{key}: {json.dumps(value)}' for key, value in content.items()]
  return '\n'.join(['---', *lines, '---'])


def _description(system: system_lib.System) -> str:
  """Returns one paragraph about the architecture and its sizes."""
  module = system.module
  sizes: dict[str, int] = {}
  for path, shape in shapes_lib.of_module(module).items():
    sizes[path[0]] = sizes.get(path[0], 0) + shape.size
  if not isinstance(module, l2s.LlmToSlm):
    kind = (
      'encoder-decoder' if module.config.is_encoder_decoder else 'decoder-only'
    )
    return f'An {kind} language model'.replace('An d', 'A d') + (
      f' of {sum(sizes.values()):,} parameters.'
    )
  layer: int | str = 'its last layer'
  if module.llm_layer == l2s.MIX:
    layer = 'a learned mix of its layers'
  elif module.llm_layer is not None:
    layer = f'its layer {module.llm_layer}'
  between = sum(n for name, n in sizes.items() if name not in ('llm', 'slm'))
  takes = {
    'add': 'adds them to its embeddings of the prompt',
    'replace': 'reads them in place of its embeddings of the prompt',
  }[module.injection]
  vocabulary = (
    'the same vocabulary'
    if module.shared_vocabulary
    else (
      'its own vocabulary: decode answers with the tokenizer in '
      'answer_tokenizer/'
    )
  )
  return (
    f'An LLM ({sizes["llm"]:,} parameters) encodes the prompt once. A '
    f'projector ({between:,}) maps the hidden states of {layer} to a small '
    f'language model (SLM, {sizes["slm"]:,}). The SLM {takes} and generates '
    f'the answer in {vocabulary} ({_PAPER}).'
  )


def _beams() -> str:
  """Returns the paragraph about beam search in transformers."""
  return (
    'Greedy decoding generates the same tokens as `l2s_jax` in float32. Beam '
    'search with `num_beams=N` does, too, if `l2s_jax` has the same '
    '`length_penalty` and `early_stopping` and '
    "`Decoding.length_penalty_form='power'`, as by default. `transformers` has "
    "no equivalent of `'gnmt'`."
  )


def _results(found: Sequence[Result]) -> str:
  """Returns the table of results."""
  if not found:
    return 'The run has no evaluation results.'
  rows = [
    {'task': result['task'], 'step': result['step'], **_shown(result['scores'])}
    for result in found
  ]
  names = dict.fromkeys(name for row in rows for name in row)
  return report.markdown_table(rows, {name: name for name in names}).rstrip()


def _shown(scores: Mapping[str, Any]) -> dict[str, str]:
  """Returns scores with four significant digits."""
  return {name: f'{value:.4g}' for name, value in scores.items()}
