# SPDX-License-Identifier: Apache-2.0
"""What the form `gguf` writes is read back as what it was."""

import dataclasses
import functools
import shutil
import signal
import time
from typing import Any

import bundles
import damaged_exports
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
import tokenizers

from l2s_jax.interop import convert, to_huggingface
from l2s_jax.interop.exports import export_command, gguf_form
from l2s_jax.models import l2s
from l2s_jax.systems import model_paths
from l2s_jax.vocabularies import huggingface, loading, sentencepiece
from l2s_jax.weights import opening
from l2s_jax.weights.formats import gguf_file

gguf = pytest.importorskip('gguf', reason='writes GGUF files')

LLAMA = dataclasses.replace(
  helpers.LLAMA,
  num_heads=4,
  attention_bias='none',
  rope_scaling=(),
  rope_base=12345.0,
  norm_epsilon=1e-5,
  max_positions=99,
)
GEMMA2 = dataclasses.replace(
  helpers.GEMMA3,
  num_heads=4,
  qk_norm=False,
  rope_base=1e4,
  rope_local_base=None,
  query_pre_attn_scalar=None,
  attention_softcap=5.0,
  logits_softcap=30.0,
)
CONFIGS = {
  'llama': LLAMA,
  'llama-untied': dataclasses.replace(LLAMA, logits_via_embedding=False),
  'llama-llama3': dataclasses.replace(
    LLAMA, rope_base=5e5, rope_scaling=(8.0, 1.0, 4.0, 8192.0)
  ),
  'llama-linear': dataclasses.replace(
    LLAMA, rope_scaling=(4.0,), rope_scaling_type='linear'
  ),
  'qwen2-yarn': dataclasses.replace(
    LLAMA,
    attention_bias='qkv',
    rope_scaling=(4.0, 16.0, 1.0, 64.0, 1 + 0.1 * np.log(4)),
    rope_scaling_type='yarn',
  ),
  'qwen3': dataclasses.replace(LLAMA, qk_norm=True),
  'gemma2': GEMMA2,
  'gemma3': dataclasses.replace(
    helpers.GEMMA3,
    num_heads=4,
    num_decoder_layers=7,
    rope_local_base=10_000.0,
    global_layer_period=6,
    query_pre_attn_scalar=None,
  ),
  'gpt2': helpers.GPT2,
  'gpt_neox': helpers.PYTHIA,
}


def make(config, folder, vocabulary=None):
  vocabulary = vocabulary or bundles.byte_pairs()
  return bundles.make(
    l2s.build(config),
    folder,
    prompt_vocabulary=vocabulary,
    answer_vocabulary=vocabulary,
  )


def write(bundle, folder):
  gguf_form.check(bundle)
  gguf_form.write(bundle, folder)
  return folder


def architecture(name):
  return name.partition('-')[0].replace('_', '')


@pytest.mark.parametrize('name', CONFIGS)
def test_a_file_reads_back_as_the_model(name, tmp_path):
  bundle = make(CONFIGS[name], tmp_path)
  folder = write(bundle, tmp_path / 'gguf')
  found = gguf_form.compare(bundle, folder, bundles.PROMPTS)
  assert f'{len(jax.tree.leaves(bundle.arrays))} tensors' in found
  reader = gguf.GGUFReader(folder / gguf_form.FILE)
  arch = reader.fields['general.architecture'].contents()
  assert arch == architecture(name)
  # What llama.cpp takes in float32 alone.
  small = [tensor for tensor in reader.tensors if len(tensor.shape) == 1]
  assert {tensor.tensor_type.name for tensor in small} == {'F32'}


def test_bfloat16_stays_bfloat16(tmp_path):
  bundle = make(LLAMA, tmp_path)
  halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bundle.arrays)
  bundle = dataclasses.replace(bundle, arrays=halved)
  folder = write(bundle, tmp_path / 'gguf')
  gguf_form.compare(bundle, folder, bundles.PROMPTS[:1])
  reader = gguf.GGUFReader(folder / gguf_form.FILE)
  kinds = {t.name: t.tensor_type.name for t in reader.tensors}
  assert kinds['blk.0.attn_q.weight'] == 'BF16'
  assert kinds['blk.0.attn_norm.weight'] == 'F32'


@functools.cache
def bpe(folder):
  """Returns a SentencePiece model of pairs, as Llama's, that keeps spaces."""
  return sentencepiece.train(
    ['the cat sat on the mat', *bundles.PROMPTS],
    folder / 'tokenizer.model',
    vocab_size=60,
    model_type='bpe',
    hard_vocab_limit=False,
    character_coverage=1.0,
    byte_fallback=False,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
  )


@pytest.mark.parametrize('train', [bpe, bundles.prompt_vocabulary])
def test_a_sentencepiece_model_comes_back(train, tmp_path):
  bundle = make(LLAMA, tmp_path, train(tmp_path))
  folder = write(bundle, tmp_path / 'gguf')
  gguf_form.compare(bundle, folder, bundles.PROMPTS)


def test_how_a_tokenizer_cuts_text_is_named(tmp_path):
  bundle = make(helpers.GPT2, tmp_path)
  folder = write(bundle, tmp_path / 'gguf')
  reader = gguf.GGUFReader(folder / gguf_form.FILE)
  fields = {name: field.contents() for name, field in reader.fields.items()}
  assert fields['tokenizer.ggml.pre'] == 'gpt-2'
  assert (
    fields['tokenizer.ggml.eos_token_id']
    == bundle.system.prompt_vocabulary.eos_id
  )
  assert len(fields['tokenizer.ggml.tokens']) == helpers.GPT2.vocab_size


def test_another_way_of_cutting_text_is_refused(tmp_path):
  bytes_and_merges = bundles.byte_pairs()
  assert isinstance(bytes_and_merges, huggingface.HuggingFaceVocabulary)
  tokenizer = bytes_and_merges.copy_tokenizer()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=True
  )
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  vocabulary = loading.load(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ValueError, match='supports only gpt-2, qwen2, smollm'):
    gguf_form.check(make(helpers.GPT2, tmp_path, vocabulary))
  with pytest.raises(ValueError, match='BPE tokenizer without merges'):
    gguf_form.check(make(helpers.GPT2, tmp_path, helpers.vocabulary()))


REFUSED: dict[str, tuple[Any, str]] = {
  'pair': (helpers.MODULES['llm_to_gpt2-add-foreign'], 'llama_batch.embd'),
  't5': (l2s.build(helpers.T5_1_1), 'is an encoder-decoder'),
  'opt': (l2s.build(helpers.OPT), 'of the family opt; --to=gguf supports only'),
  'gemma3': (
    l2s.build(dataclasses.replace(CONFIGS['gemma3'], rope_local_base=7.0)),
    'rope_local_base=7.0 .read back as 10000.0',
  ),
  'mistral': (
    l2s.build(dataclasses.replace(LLAMA, sliding_window=3)),
    'architecture llama .*\n.*sliding_window=3 .read back as 0',
  ),
  'qwen2': (
    l2s.build(dataclasses.replace(helpers.QWEN2, num_heads=4)),
    '(?s)sliding_window=3 .read back as 0.*first_window_layer=1 .read back as',
  ),
  'llama3': (
    l2s.build(dataclasses.replace(LLAMA, rope_scaling=(8.0, 1.0, 4.0, 12.0))),
    'supports only that of Llama 3.1',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_a_file_cannot_say_is_refused(name, tmp_path):
  module, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    gguf_form.check(bundles.make(module, tmp_path))


def test_other_tensors_are_noticed(tmp_path):
  bundle = make(LLAMA, tmp_path)
  folder = write(bundle, tmp_path / 'gguf')
  changed = {
    **bundle.arrays,
    'token_embedder': {
      'embedding': -bundle.arrays['token_embedder']['embedding']
    },
  }
  with pytest.raises(
    ValueError, match='Differing tensors:\n  token_embedder/embedding'
  ):
    gguf_form.compare(
      dataclasses.replace(bundle, arrays=changed), folder, bundles.PROMPTS
    )


def test_a_file_is_converted_like_any_other(tmp_path):
  """By the same reader that `convert --from=gguf` has."""
  bundle = make(LLAMA, tmp_path)
  folder = write(bundle, tmp_path / 'gguf')
  assert gguf_file.File(folder / gguf_form.FILE).config.rope_base == 12345.0


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """Returns the folder of a Llama that the verb exports."""
  folder = tmp_path_factory.mktemp('pretrained')
  bundle = make(LLAMA, folder)
  vocabulary = bundle.system.prompt_vocabulary
  source = helpers.Arrays(LLAMA, bundle.arrays)
  to_huggingface.save(source, folder, vocabulary)
  vocabulary.save(folder)
  return folder


@pytest.fixture(scope='module')
def exported(pretrained, tmp_path_factory):
  folder = tmp_path_factory.mktemp('exported') / 'gguf'
  export_command.export(str(pretrained), str(folder), to='gguf')
  return folder


FAULTS = damaged_exports.of(gguf_form.FILE)


@pytest.mark.parametrize('fault', FAULTS)
def test_a_changed_folder_is_refused_by_name(fault, exported, tmp_path):
  folder = tmp_path / 'gguf'
  shutil.copytree(exported, folder)
  file = str(folder / gguf_form.FILE)
  model_paths.load(file)
  change, message = FAULTS[fault]
  change(folder)
  errors = (ValueError, FileNotFoundError)
  for load in (model_paths.load, opening.open_source):
    with pytest.raises(errors, match=message):
      load(file)
  message += '|does not exist'
  with pytest.raises(errors, match=message):
    convert.convert(file, str(tmp_path / 'out'), from_='gguf', to='hf')
  with pytest.raises(errors, match=message):
    export_command.export(file, str(tmp_path / 'out'), to='bundle')
  assert not (tmp_path / 'out').exists()


def test_a_failed_comparison_leaves_nothing(pretrained, tmp_path, monkeypatch):
  read = gguf_file.File.read

  def read_another(self, path, layer=None):
    return read(self, path, layer) + np.float32(path[-1] == 'embedding')

  monkeypatch.setattr(gguf_file.File, 'read', read_another)
  with pytest.raises(ValueError, match='Differing tensors:\n  token_embedder'):
    export_command.export(str(pretrained), f'{tmp_path}/deep/new', to='gguf')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['bundle', 'gguf'])
def test_a_kill_leaves_nothing_at_the_target(name, pretrained, tmp_path):
  """Killed while the bundle is compared, or the file is written."""
  target = tmp_path / 'new'
  process = tiny_runs.start('export', str(pretrained), str(target), '--to=gguf')
  while not (tmp_path / '.new.unfinished' / name).exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not target.exists()
  export_command.export(str(pretrained), str(target), to='gguf')
  assert [path.name for path in tmp_path.iterdir()] == ['new']
