# SPDX-License-Identifier: Apache-2.0
"""What the form `hf` writes is run by transformers, token for token."""

import dataclasses
import json
import logging
import pathlib
from typing import Any

import bundles
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2s_jax.interop import convert
from l2s_jax.interop.exports import export_command, hf_form
from l2s_jax.models import l2s
from l2s_jax.systems import model_paths
from l2s_jax.vocabularies import export
from l2s_jax.weights import manifest, opening

PREFIXED = dataclasses.replace(
  helpers.T5GEMMA, emb_dim=24, num_heads=4, num_kv_heads=2
)


def answer(request):
  """Asks transformers in this process, which has imported it already."""
  from l2s_jax.interop.exports import hf_answers

  return hf_answers.answer(request)


def write(bundle, folder):
  hf_form.check(bundle)
  hf_form.write(bundle, folder)
  return folder


LLM_LAYERS: dict[str, Any] = {'first': 0, 'middle': 2, 'mix': 'mix'}
MODULES = {
  name: module
  for name, module in helpers.MODULES.items()
  if isinstance(module, l2s.LlmToSlm)
}
MODULES |= {
  'llm_to_gemma3-add-foreign': helpers.llm_to_slm(
    'gemma3', 'add', 'foreign', PREFIXED, num_heads=4
  ),
  'llm_to_t5gemma': helpers.llm_to_slm(
    't5gemma', 'add', 'shared', PREFIXED, num_heads=4, logits_softcap=30.0
  ),
  'llm_to_umt5': helpers.llm_to_slm('umt5', 'add', 'foreign', helpers.UMT5),
  'llm_to_opt': helpers.llm_to_slm('opt', 'add', 'shared', PREFIXED),
  'llama_to_llama': helpers.llm_to_slm(
    'llama', 'add', 'shared', dataclasses.replace(helpers.LLAMA, emb_dim=24)
  ).clone(llm_prefix_ids=(5, 9)),
  # Both with windows that are narrower than the prompts.
  'qwen2_to_mistral': helpers.llm_to_slm(
    'mistral',
    'add',
    'foreign',
    dataclasses.replace(helpers.QWEN2, emb_dim=24, num_heads=4),
    num_heads=4,
  ),
  'scaled': helpers.llm_to_slm(
    't5_1_1',
    'add',
    'shared',
    dataclasses.replace(helpers.LLM, scale_attention=True),
    scale_attention=True,
    head_dim=8,
  ),
} | {
  f'layer-{name}-{slm}': helpers.llm_to_slm(slm, 'add', 'shared', llm).clone(
    llm_layer=layer
  )
  for name, layer in LLM_LAYERS.items()
  for slm, llm in (('t5_1_0', helpers.LLM), ('gpt2', PREFIXED))
}


MODELS = {name: helpers.MODULES[name] for name in ('t5_1_1', 'gpt2', 'llama')}
MODELS |= {
  name: l2s.build(dataclasses.replace(config, num_heads=4, max_positions=64))
  for name, config in (
    ('llama', helpers.LLAMA),
    ('mistral', helpers.MISTRAL),
    ('olmo2', helpers.OLMO2),
    ('smollm3', helpers.SMOLLM3),
  )
}
# Of each kind of SLM one, with windows, another vocabulary, another layer.
GENERATING = (
  'llm_to_t5_1_1-add-foreign',
  'llm_to_gpt2-add-foreign',
  'llm_to_gemma3-add-foreign',
  'qwen2_to_mistral',
  'layer-mix-t5_1_0',
)


class Recorder(logging.Handler):
  """Keeps what is logged."""

  def __init__(self, level: int):
    super().__init__(level)
    self.messages: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.messages.append(record.getMessage())


def load(folder):
  torch, transformers = helpers.import_reference()
  config = transformers.AutoConfig.from_pretrained(
    folder, trust_remote_code=True
  )
  kind = 'Seq2SeqLM' if config.is_encoder_decoder else 'CausalLM'
  handler = Recorder(logging.WARNING)
  logger = logging.getLogger('transformers')
  logger.addHandler(handler)
  try:
    model, found = getattr(transformers, f'AutoModelFor{kind}').from_pretrained(
      folder, trust_remote_code=True, output_loading_info=True
    )
  finally:
    logger.removeHandler(handler)
  assert not any(found.values()), found
  # transformers 5 prints this for each T5 1.1 and umT5, also for Google's own.
  known = kind == 'Seq2SeqLM' and config.model_type in ('t5', 'umt5')
  said = handler.messages
  assert all(known and 'NOT tie' in text for text in said), said
  return torch, model.eval()


def padded_left(tokens, mask):
  """Returns both with each row's padding moved to the left."""
  order = mask.argsort(dim=1, stable=True)
  return tokens.gather(1, order), mask.gather(1, order)


@pytest.mark.parametrize('name', helpers.cases(MODULES))
def test_transformers_computes_the_logits_of_a_pair(name, tmp_path):
  bundle = bundles.make(MODULES[name], tmp_path)
  torch, model = load(write(bundle, tmp_path / 'hf'))
  batch = helpers.batch_for(MODULES[name])
  prompt, mask, answer, answer_mask = (
    torch.tensor(np.asarray(batch[key])).long()
    for key in (
      'encoder_input_tokens',
      'encoder_segment_ids',
      'decoder_input_tokens',
      'decoder_segment_ids',
    )
  )
  real = answer_mask.numpy() > 0
  ours = np.asarray(helpers.logits(MODULES[name], bundle.arrays, batch))[real]
  for tokens, its_mask in ((prompt, mask), padded_left(prompt, mask)):
    with torch.no_grad():
      theirs = model(
        input_ids=tokens,
        attention_mask=its_mask,
        decoder_input_ids=answer,
        decoder_attention_mask=answer_mask,
      )
    helpers.assert_close(theirs.logits.numpy()[real], ours)


@pytest.mark.parametrize('name', GENERATING)
def test_transformers_writes_the_tokens_of_a_pair(name, tmp_path):
  bundle = bundles.make(MODULES[name], tmp_path)
  folder = write(bundle, tmp_path / 'hf')
  found = hf_form.compare(bundle, folder, bundles.PROMPTS, answer)
  assert 'greedy and 4 beams' in found


def test_a_folder_runs_without_this_package(tmp_path):
  """In a process of its own, of a baseline whose answers have a start token."""
  helpers.import_reference()
  bundle = bundles.make(MODELS['gpt2'], tmp_path)
  folder = write(bundle, tmp_path / 'hf')
  assert 'same tokens for 2 prompts' in hf_form.compare(
    bundle, folder, bundles.PROMPTS[:2]
  )


@pytest.mark.parametrize(
  'name, options',
  [
    ('t5_1_1', {}),
    ('mistral', {}),
    ('olmo2', {}),
    ('smollm3', {}),
    ('llama', {'continues': True}),
  ],
)
def test_transformers_writes_the_tokens_of_a_model_alone(
  name, options, tmp_path
):
  helpers.import_reference()
  bundle = bundles.make(MODELS[name], tmp_path, **options)
  folder = write(bundle, tmp_path / 'hf')
  hf_form.compare(bundle, folder, bundles.PROMPTS, answer)
  assert not (folder / hf_form.MODELING).exists()


@pytest.mark.parametrize('name', MODELS)
def test_a_model_alone_loads_without_a_warning(name, tmp_path):
  load(write(bundles.make(MODELS[name], tmp_path), tmp_path / 'hf'))


def test_a_converted_folder_loads_without_a_warning(tmp_path):
  kept = pathlib.Path(__file__).parent / 'kept_runs' / '1'
  convert.convert(f'{kept}/gpt', f'{tmp_path}/hf', from_='l2s', to='hf')
  load(tmp_path / 'hf' / 'slm')


def test_a_folder_of_a_model_without_a_maximum_of_positions_is_read(tmp_path):
  config = dataclasses.replace(
    helpers.LLAMA, num_heads=4, max_positions=0, rope_scaling=()
  )
  bundle = bundles.make(l2s.build(config), tmp_path)
  folder = write(bundle, tmp_path / 'hf')
  content = json.loads((folder / 'config.json').read_text())
  assert content['max_position_embeddings'] > 0
  found = opening.open_source(str(folder)).config
  assert dataclasses.replace(found, max_positions=0) == config


def test_other_weights_are_noticed(tmp_path):
  helpers.import_reference()
  module = MODELS['t5_1_1']
  bundle = bundles.make(module, tmp_path)
  folder = write(bundle, tmp_path / 'hf')
  changed = jax.tree.map(np.asarray, helpers.random_params(module, seed=1))
  with pytest.raises(ValueError, match='generates .* but the run generates'):
    hf_form.compare(
      dataclasses.replace(bundle, arrays=changed),
      folder,
      bundles.PROMPTS[:2],
      answer,
    )


def test_another_tokenizer_is_noticed(tmp_path):
  helpers.import_reference()
  bundle = bundles.make(MODELS['t5_1_1'], tmp_path)
  folder = write(bundle, tmp_path / 'hf')
  export.save(folder, bundle.system.prompt_vocabulary)  # without EOS
  with pytest.raises(ValueError, match="encodes 'a' as .* but the run as"):
    hf_form.compare(bundle, folder, bundles.PROMPTS[:1], answer)


def test_what_transformers_has_no_class_for_is_refused(tmp_path):
  helpers.import_reference()
  config = dataclasses.replace(helpers.GPT2, bidirectional_prefix=True)
  bundle = bundles.make(l2s.build(config), tmp_path)
  with pytest.raises(ValueError, match='bidirectional_prefix=True'):
    hf_form.check(bundle)


def test_a_scale_that_bfloat16_does_not_hold_is_refused(tmp_path):
  helpers.import_reference()
  config = dataclasses.replace(helpers.T5_1_1, scale_attention=True, head_dim=8)
  bundle = bundles.make(l2s.build(config), tmp_path)
  hf_form.check(bundle)
  halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bundle.arrays)
  bundle = dataclasses.replace(bundle, arrays=halved)
  with pytest.raises(ValueError, match='--dtype=float32'):
    hf_form.check(bundle)


def test_the_card_has_results_and_a_program(tmp_path, capsys, monkeypatch):
  bundle = bundles.make(MODULES['llm_to_gpt2-add-foreign'], tmp_path)
  results = [{'task': 'wmt-test', 'step': 7, 'scores': {'bleu': 31.25}}]
  bundle.content['facts'] = {'results': results, 'license': 'mit'}
  card = (write(bundle, tmp_path / 'hf') / 'README.md').read_text()
  row = next(line for line in card.splitlines() if 'wmt-test |' in line)
  assert row.split() == ['|', 'wmt-test', '|', '7', '|', '31.25', '|']
  front = card.split('---\n')[1]
  (index,) = json.loads(front.split('model-index: ')[1].splitlines()[0])
  assert index['results'][0]['metrics'] == [{'type': 'bleu', 'value': 31.25}]
  assert 'license: "mit"' in front
  program = card.split('```python\n')[1].split('```')[0]
  assert 'answer_tokenizer' in program
  helpers.import_reference()
  monkeypatch.chdir(tmp_path / 'hf')
  exec(compile(program, 'README.md', 'exec'), {})
  # It does not ask whether the folder's code may run.
  assert 'wish to run' not in capsys.readouterr().out


@pytest.mark.parametrize(
  'name', [pytest.param('l2s', marks=pytest.mark.long), 'gpt']
)
def test_the_verb_leaves_a_folder_that_was_compared(
  name, tmp_path, capsys, monkeypatch
):
  helpers.import_reference()
  monkeypatch.chdir(tmp_path)
  kept = pathlib.Path(__file__).parent / 'kept_runs' / '1'
  export_command.export(
    f'{kept}/{name}',
    'out',  # transformers runs in another folder.
    to='hf',
    llm_path=f'{kept}/llm',
    license='mit',
  )
  assert 'hf: transformers generates the same tokens' in capsys.readouterr().out
  content = manifest.read(tmp_path / 'out', 'hf')
  assert {hf_form.MODELING, 'README.md', 'tokenizer.json'} <= set(
    content['files']
  )
  assert content['facts']['license'] == 'mit'
  # No path of this machine goes along, and none of its code is run by us.
  for path in (tmp_path / 'out').rglob('*.json'):
    assert str(kept) not in path.read_text()
  with pytest.raises(
    ValueError, match='is of LLM-to-SLM, exported for transformers'
  ):
    model_paths.load(str(tmp_path / 'out'))
  with pytest.raises(ValueError, match='The model is LLM-to-SLM'):
    export_command.export(
      f'{kept}/{name}', f'{tmp_path}/other', to='gguf', llm_path=f'{kept}/llm'
    )
  assert [path.name for path in tmp_path.iterdir()] == ['out']
