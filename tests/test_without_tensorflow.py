# SPDX-License-Identifier: Apache-2.0
"""The core works where TensorFlow, SeqIO and TFDS cannot be imported."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

SCRIPT = """
import sys

for name in (
    'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio'):
  sys.modules[name] = None  # importing it raises ModuleNotFoundError

import functools, importlib, io, json, pathlib, pkgutil
import jax, numpy as np
import l2s_jax
from l2s_jax.data import cldr, packing
from l2s_jax.inference import infer
from l2s_jax.models import config as config_lib
from l2s_jax.runtime import partitioning
from l2s_jax.systems import builders, parameters, run_folder
from l2s_jax.systems import system as system_lib
from l2s_jax.training import checkpoint, optim, resuming, train_step
from l2s_jax.vocabularies import sentencepiece as sentencepiece_lib

NEEDS_TENSORFLOW = {
  'l2s_jax.data.features',
  'l2s_jax.evaluation.seqio_evaluator',
}
# What exported folders carry along: for JAX, ONNX Runtime, transformers alone.
PROGRAMS = {
  f'l2s_jax.interop.exports.{name}'
  for name in (
      'hf_answers', 'modeling_llm_to_slm', 'run_onnx', 'run_stablehlo',
      'verify')
}
# A model of T5X, for T5X.
NEEDS_T5X = {'l2s_jax.interop.t5x'}
LEFT_OUT = NEEDS_TENSORFLOW | NEEDS_T5X | PROGRAMS | {'l2s_jax.__main__'}
for module in pkgutil.walk_packages(l2s_jax.__path__, 'l2s_jax.'):
  if module.name not in LEFT_OUT:
    importlib.import_module(module.name)

folder = pathlib.Path(sys.argv[1])
examples = list(cldr.examples('train', num_examples=300))
sentencepiece_lib.train(
    (text for e in examples for text in (e['prompt'], e['answer'])),
    folder / 'v.model', vocab_size=200, hard_vocab_limit=False,
    character_coverage=1.0)
config = config_lib.TransformerConfig(
    vocab_size=200, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_encoder_layers=1, num_decoder_layers=1)
system = builders.language_model_system(
    system_lib.Tower(config=config, vocabulary=str(folder / 'v.model')))
mesh_config = partitioning.MeshConfig()
mesh = partitioning.make_mesh(mesh_config)
optimizer = optim.adamw(1e-3).make({})
with partitioning.use_mesh(mesh):
  layout = parameters.layout(system, mesh, mesh_config)
  run_folder.save(system, folder)
  checkpointer = checkpoint.Checkpointer(folder)
  state = resuming.restore_or_create(
      system, layout, optimizer, mesh, checkpointer, 0)
  vocabulary = system.prompt_vocabulary
  ids = lambda text: [*vocabulary.encode(text), vocabulary.eos_id]
  batch = packing.lay_out(
      [ids(e['prompt'])[:32] for e in examples[:4]],
      [ids(e['answer'])[:16] for e in examples[:4]], range(4),
      task_feature_lengths={'inputs': 32, 'targets': 16},
      prompt_pad_id=vocabulary.pad_id, answer_pad_id=vocabulary.pad_id,
      start_id=vocabulary.start_id)
  step = jax.jit(functools.partial(
      train_step.train_step, module=system.module, optimizer=optimizer))
  state, sums = step(state, {}, partitioning.put_batch(batch, mesh))
  assert np.isfinite(float(sums['loss'])) and float(sums['loss_weight']) > 0
  checkpointer.save(state, {'num_examples': 4})
  checkpointer.wait()
  again = resuming.restore_or_create(
      system, layout, optimizer, mesh, checkpointer, 0)
  assert checkpointer.restore_data() == {'num_examples': 4}
  assert int(again.step) == 1
  jax.tree.map(np.testing.assert_array_equal, state.trainable, again.trainable)
  checkpointer.close()

prompts = folder / 'prompts.jsonl'
prompts.write_text(''.join(
    json.dumps({'prompt': e['prompt'], 'id': i}) + '\\n'
    for i, e in enumerate(examples[:3])))
infer.infer(checkpoint_path=str(folder), input=str(prompts),
            output_dir=str(folder / 'out'), prompt_length=32,
            max_decode_len=8, batch_size=2)
lines = (folder / 'out' / 'predictions.jsonl').read_text().splitlines()
assert [json.loads(line)['id'] for line in lines] == [0, 1, 2]
print('core works')
"""


def test_core_works_where_tensorflow_is_absent(tmp_path):
  result = subprocess.run(
    [sys.executable, '-c', SCRIPT, str(tmp_path)],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert result.stdout.endswith('core works\n')
