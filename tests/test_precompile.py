# SPDX-License-Identifier: Apache-2.0
"""Laws of precompile: what fits, what does not, and what is said of it.

What needs the TPU's compiler skips where `libtpu` is not installed.
"""

import dataclasses
import importlib.util
import json
import re
import sys

import pytest

from l2s_jax.models import config as config_lib
from l2s_jax.performance.pods import (
  hlo_costs,
  pod_compiler,
  precompile,
  precompile_report,
)
from l2s_jax.runtime import chips, partitioning
from l2s_jax.systems import system
from l2s_jax.training import optim

HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
needs_libtpu = pytest.mark.skipif(
  not HAS_LIBTPU,
  reason='libtpu is not installed: pip install -r requirements-tpu.txt',
)

SLM = config_lib.TransformerConfig(
  vocab_size=1024,
  emb_dim=256,
  num_heads=4,
  head_dim=64,
  mlp_dim=512,
  num_encoder_layers=2,
  num_decoder_layers=2,
  logits_via_embedding=False,
)
LLM = dataclasses.replace(SLM, emb_dim=384, num_encoder_layers=6)
LENGTHS = {'inputs': 128, 'targets': 128}
FSDP = partitioning.MeshConfig(data=2, fsdp=4)
V5E = chips.CHIPS['v5e']


def run(**settings):
  given = {
    'topology': 'v5e:2x4',
    'llm': system.Tower(config=LLM),
    'slm': system.Tower(config=SLM),
    'task_feature_lengths': LENGTHS,
    'batch_size': 64,
    'optimizer': optim.adamw(),
    'mesh': FSDP,
  }
  return precompile.precompile(**{**given, **settings})


@pytest.mark.parametrize(
  'settings,message',
  [
    ({'topology': None}, 'Set --topology'),
    ({'topology': 'v5e:8'}, "TOPOLOGY='v5e:8': expected a TPU"),
    ({'llm': None, 'slm': None}, 'Nothing to compile'),
    ({'program_names': ('decode',)}, 'decode needs the result of prefill'),
    ({'program_names': 'train'}, 'expected a tuple'),
    ({'injection': 'prepend'}, "INJECTION='prepend' is not one of"),
    ({'batch_size': 0}, 'BATCH_SIZE=0'),
    ({'topology': 'v5e:32x32'}, 'larger than a pod'),
  ],
)
def test_refuses_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    run(**settings)


def test_names_what_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)  # Which cannot be found.
  with pytest.raises(ValueError, match=r'l2s_jax\[tpu\]'):
    run()


@needs_libtpu
@pytest.mark.long
def test_the_attention_kernel_moves_fewer_bytes_for_the_same_products():
  """Backward, it multiplies once more: it computes the logits again."""
  settings = {'program_names': ('train',), 'remat': 'full', 'batch_size': 128}
  lengths = {'inputs': 512, 'targets': 128}
  plain, kernel = (
    run(attention=form, task_feature_lengths=lengths, **settings)[0]
    for form in ('plain', 'auto')
  )
  assert plain['flops'] <= kernel['flops'] < 1.1 * plain['flops']
  assert kernel['hbm_bytes_moved'] < 0.7 * plain['hbm_bytes_moved']
  assert kernel['temporary_bytes'] < plain['temporary_bytes']


@needs_libtpu
def test_compiles_for_a_tpu(tmp_path, capsys):
  rows = run(output_dir=str(tmp_path / 'out'), decode_batch_sizes=8)
  train, prefill, decode = rows
  assert [row['program'] for row in rows] == ['train', 'prefill', 'decode']
  for row in rows:
    assert row['fits'] and 0 < row['peak_bytes'] < V5E.hbm_bytes
    assert row['bound_secs'] == max(
      row['compute_secs'], row['hbm_secs'], row['interconnect_secs']
    )
    assert 0 < row['utilization_bound'] <= 1
  for row in (train, prefill):
    assert row['flops'] == pytest.approx(row['model_flops'], rel=0.05)
  # The LLM's six layers are gathered one at a time, forward alone.
  assert any('llm.encode' in x['op_name'] for x in train['collectives'])
  assert not any('llm' in x['op_name'] for x in decode['collectives'])
  printed = capsys.readouterr().out
  assert 'data=2, fsdp=4, tensor=1' in printed and 'utilization' in printed
  written = json.loads((tmp_path / 'out' / 'precompile.json').read_text())
  assert written['programs'] == json.loads(json.dumps(rows))
  table = (tmp_path / 'out' / 'precompile.md').read_text()
  assert '| decode | 8 | yes |' in table


@needs_libtpu
@pytest.mark.parametrize(
  'settings,message',
  [
    ({'batch_size': 12}, 'BATCH_SIZE=12 does not divide over the 8 devices'),
    ({'decode_batch_sizes': (8, 1)}, 'DECODE_BATCH_SIZES=1 does not divide'),
    ({'topology': 'v5e:3x5'}, 'is not a slice that the compiler'),
  ],
)
def test_refuses_before_it_compiles(settings, message, capsys):
  with pytest.raises(ValueError, match=message):
    run(**settings)
  assert 'compiling' not in capsys.readouterr().err


@needs_libtpu
def test_a_dry_run_says_what_arguments_take(capsys):
  wide = dataclasses.replace(SLM, mlp_dim=2**18)
  assert run(slm=system.Tower(config=wide), dry_run=True) == []
  printed = capsys.readouterr().out
  # 0.54 billion parameters of the SLM over four shards, and AdamW's moments.
  assert 'trainable 0.50 GiB, optimizer 1.00 GiB, batch 0.00 GiB' in printed


@needs_libtpu
def test_says_what_fits_instead():
  """AdamW of 1.6 billion parameters: too much for each chip, not for eight."""
  wide = dataclasses.replace(SLM, emb_dim=1024, mlp_dim=2**18)
  with pytest.raises(ValueError, match='does not fit on v5e:2x4') as caught:
    run(
      llm=None,
      slm=system.Tower(config=wide),
      mesh=partitioning.MeshConfig(),
      batch_size=8,
      task_feature_lengths={'inputs': 16, 'targets': 16},
      program_names=('train',),
    )
  message = str(caught.value)
  assert 'GiB of the 15.75 GiB of a device' in message
  assert re.search(
    r'2\.00 GiB float32\[2, 1024, 262144\] optimizer/.*/mlp/wi/kernel', message
  )
  assert 'This fits, as compiled' in message
  assert 'MeshConfig(data=1, fsdp=8, tensor=1)' in message
  assert re.search(r'largest temporaries:\n  0\.\d+ GiB \[', message)


def test_reads_the_compilers_error():
  """As libtpu 0.0.42 writes it."""
  row = pod_compiler.out_of_memory(
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (31.50G) exceeds available HBM (15.75G).',
    V5E,
  )
  assert not row['fits']
  assert row['peak_bytes'] == 31.5 * chips.GIB
  assert row['free_fraction'] == -1
  row = pod_compiler.out_of_memory('HLO temporaries (1.25T) exceeds', V5E)
  assert row['peak_bytes'] == 1280 * chips.GIB
  with pytest.raises(ValueError, match='of an unknown kind'):
    pod_compiler.out_of_memory('RESOURCE_EXHAUSTED: of patience', V5E)


def test_neighbours_need_less_and_less():
  setting = pod_compiler.Setting(
    64, partitioning.MeshConfig(4, 1, 2), 1, 'none'
  )
  found = list(pod_compiler.neighbours(setting, 8))
  assert [str(x) for x in found] == [
    f'BATCH_SIZE={batch}, NUM_MICROBATCHES={parts}, REMAT={remat!r}, '
    'MeshConfig(data=1, fsdp=4, tensor=2)'
    for batch, parts, remat in (
      (64, 1, 'none'),
      (64, 1, 'minimal'),
      (64, 1, 'full'),
      (64, 2, 'full'),
      (64, 4, 'full'),
      (64, 8, 'full'),
      (64, 16, 'full'),
    )
  ]


def test_largest_temporaries_are_those_in_hbm():
  text = """
%fused (p: f32[64]) -> f32[8192] {
  ROOT %inside = f32[8192]{0} broadcast(%p), dimensions={}
}

ENTRY %main (x: f32[64]) -> f32[128] {
  %x = f32[4096]{0} parameter(0)
  %on_chip = f32[2048]{0:S(1)} copy(%x)
  %y = f32[64]{0} negate(%x), metadata={op_name="model/y"}
  ROOT %z = f32[128]{0} fusion(%y), kind=kLoop, calls=%fused
}
"""
  assert pod_compiler.largest_temporaries(text) == [
    {'name': 'fusion', 'shape': '[128]', 'bytes': 512},
    {'name': 'model/y', 'shape': '[64]', 'bytes': 256},
  ]


def test_collectives_that_are_alike_are_a_row():
  def collective(kind, count, num_bytes, devices=(0, 1)):
    return hlo_costs.Collective(kind, devices, (4,), num_bytes, count, 'mlp')

  rows = pod_compiler.by_kind(
    [
      collective('all-reduce', 2, 10.0),
      collective('all-gather', 24, 4.0),
      collective('all-gather', 24, 4.0),
      collective('all-reduce', 1, 0.0, devices=(0,)),
    ]
  )
  assert [(x['kind'], x['count'], x['bytes']) for x in rows] == [
    ('all-gather', 48, 192),
    ('all-reduce', 2, 20),
  ]


def test_a_refusal_names_tensors():
  row = {
    'program': 'train',
    'batch_size': 128,
    'topology': 'v5e:2x4',
    'peak_bytes': 20 * chips.GIB,
    'free_fraction': 1 - 20 / 16,
    'arguments': [
      {'name': 'frozen/llm/wi', 'shape': 'bfloat16[8]', 'bytes': chips.GIB}
    ],
  }
  text = precompile_report.refusal(row)
  assert '20.00 GiB of the 16.00 GiB' in text
  assert '1.00 GiB bfloat16[8] frozen/llm/wi' in text
