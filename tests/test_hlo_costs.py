# SPDX-License-Identifier: Apache-2.0
"""Laws of counting: each line as often as it runs, each byte where it lies.

The texts are what XLA:TPU and XLA:CPU write, cut short.
"""

import jax
import jax.numpy as jnp
import pytest

from l2s_jax.performance.pods import hlo, hlo_costs

# A loop over 24 layers in which a loop of 4 turns (its counter goes up by 2)
# passes weights around while they are multiplied.
NESTED = """
HloModule jit_f, is_scheduled=true

%fused (param_0: bf16[128,2048], param_1: bf16[2048,2048]) -> bf16[128,2048] {
  %param_0 = bf16[128,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[2048,2048]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.5 = bf16[128,2048]{1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), dim_labels=bf_io->bf
}

%inner_body (p.1: (bf16[128,2048], bf16[2048,2048], u32[], u32[])) -> (bf16[128,2048], bf16[2048,2048], u32[], u32[]) {
  %p.1 = (bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[], u32[]) parameter(0)
  %x.1 = bf16[128,2048]{1,0} get-tuple-element(%p.1), index=0
  %w.1 = bf16[2048,2048]{1,0:S(1)} get-tuple-element(%p.1), index=1
  %i.1 = u32[] get-tuple-element(%p.1), index=2
  %step.1 = u32[] get-tuple-element(%p.1), index=3
  %copy.1 = u32[] copy(%i.1)
  %add.1 = u32[] add(%copy.1, %step.1)
  %fusion.1 = bf16[128,2048]{1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%fused
  %start.1 = (bf16[2048,2048]{1,0:S(1)}, bf16[2048,2048]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%w.1), channel_id=4, source_target_pairs={{0,3},{1,0},{2,1},{3,2}}, metadata={op_name="layers/mlp"}
  %done.1 = bf16[2048,2048]{1,0:S(1)} collective-permute-done(%start.1)
  ROOT %tuple.1 = (bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[], /*index=3*/u32[]) tuple(%fusion.1, %done.1, %add.1, %step.1)
}

%inner_cond (p.2: (bf16[128,2048], bf16[2048,2048], u32[], u32[])) -> pred[] {
  %p.2 = (bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[], u32[]) parameter(0)
  %end.2 = u32[] constant(8)
  %i.2 = u32[] get-tuple-element(%p.2), index=2
  ROOT %lt.2 = pred[] compare(%i.2, %end.2), direction=LT
}

%body (p.3: (s32[], bf16[128,2048], bf16[2048,2048], u32[])) -> (s32[], bf16[128,2048], bf16[2048,2048], u32[]) {
  %p.3 = (s32[], bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %one.3 = s32[] constant(1)
  %add.3 = s32[] add(%i.3, %one.3)
  %x.3 = bf16[128,2048]{1,0} get-tuple-element(%p.3), index=1
  %w.3 = bf16[2048,2048]{1,0:S(1)} get-tuple-element(%p.3), index=2
  %two.3 = u32[] get-tuple-element(%p.3), index=3
  %zero.3 = u32[] constant(0)
  %tuple.3 = (bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[], u32[]) tuple(%x.3, %w.3, %zero.3, %two.3)
  %while.3 = (bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[], u32[]) while(%tuple.3), condition=%inner_cond, body=%inner_body
  %y.3 = bf16[128,2048]{1,0} get-tuple-element(%while.3), index=0
  ROOT %out.3 = (s32[], bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[]) tuple(%add.3, %y.3, %w.3, %two.3)
}

%cond (p.4: (s32[], bf16[128,2048], bf16[2048,2048], u32[])) -> pred[] {
  %p.4 = (s32[], bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[]) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %end.4 = s32[] constant(24)
  ROOT %lt.4 = pred[] compare(%i.4, %end.4), direction=LT
}

ENTRY %main (x: bf16[128,2048], w: bf16[2048,2048]) -> bf16[128,2048] {
  %x = bf16[128,2048]{1,0} parameter(0)
  %w = bf16[2048,2048]{1,0:S(1)} parameter(1)
  %zero = s32[] constant(0)
  %two = u32[] constant(2)
  %copy = s32[] copy(%zero)
  %tuple = (s32[], bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[]) tuple(%copy, %x, %w, %two)
  %while = (s32[], bf16[128,2048]{1,0}, bf16[2048,2048]{1,0:S(1)}, u32[]) while(%tuple), condition=%cond, body=%body
  ROOT %y = bf16[128,2048]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_nested_loops_multiply():
  costs = hlo_costs.count(NESTED)
  turns = 24 * 4
  assert not costs.open_loops
  assert costs.flops == turns * 2 * 128 * 2048 * 2048
  (permute,) = costs.collectives
  assert permute.count == turns
  assert permute.devices == (0, 3, 2, 1)
  assert permute.num_bytes == 2 * 2048 * 2048
  assert permute.op_name == 'layers/mlp'
  assert costs.collective_bytes == turns * 2 * 2048 * 2048


def test_memory_on_the_chip_is_not_hbm():
  """Weights in S(1) do not count: activations are read and written."""
  counters = 24 * (4 * 8 + 12) + 2 * 4 + 24 * 4 * 2
  moved = hlo_costs.count(NESTED).hbm_bytes
  assert moved == pytest.approx(24 * 4 * 2 * 2 * 128 * 2048, abs=2 * counters)


def test_loops_that_data_end_are_apart():
  text = NESTED.replace('constant(24)', 'parameter(1)')
  costs = hlo_costs.count(text)
  assert costs.flops == 0
  (turn,) = costs.open_loops
  assert turn.flops == 4 * 2 * 128 * 2048 * 2048


def program(*lines):
  text = '\n'.join(f'  {line}' for line in lines)
  return (
    'HloModule jit_f, replica_count=1, num_partitions=8\n\n'
    f'ENTRY %main () -> f32[] {{\n{text}\n}}\n'
  )


@pytest.mark.parametrize(
  'groups,devices',
  [
    ('{{0,2},{1,3}}', (0, 2)),
    ('{}', tuple(range(8))),
    ('[2,4]<=[8]', (0, 1, 2, 3)),
    ('[4,2]<=[2,4]T(1,0)', (0, 4)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
    ("mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
    ("mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
    (
      "mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}",
      (0, 2),
    ),
  ],
)
@pytest.mark.parametrize(
  'kind,shape,factor',
  [
    ('all-gather', 'f32[{n},64]', lambda n: n - 1),
    ('all-reduce', 'f32[1,64]', lambda n: 2 * (n - 1) / n),
    ('reduce-scatter', 'f32[1,64]', lambda n: (n - 1) / n),
    ('all-to-all', 'f32[1,64]', lambda n: (n - 1) / n),
  ],
)
def test_groups_and_bytes_of_collectives(groups, devices, kind, shape, factor):
  n = len(devices)
  text = program(
    '%x = f32[1,64]{1,0} parameter(0)',
    f'ROOT %y = {shape.format(n=n)}{{1,0}} {kind}(%x), channel_id=1, '
    f'replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true',
  )
  (found,) = hlo_costs.count(text).collectives
  assert found.kind == kind
  assert found.devices == devices
  assert found.num_bytes == pytest.approx(256 * factor(n))


def test_a_collective_spread_over_fusions_counts_once():
  """XLA:TPU starts one, goes on with it beside other work, and ends it."""
  gather = (
    '%{name} = f32[8,64]{{1,0}} all-gather(%p), channel_id=514, '
    'replica_groups=[1,8]<=[8], frontend_attributes={{chain_id="0"}}'
  )
  computations = []
  for name, root in (
    ('begin', 'ROOT %r = (f32[8,64]) custom-call(%begin.1), '
     'custom_call_target="AsyncCollectiveStart"'),
    ('go_on', 'ROOT %r = f32[8,64] negate(%go_on.1)'),
  ):  # fmt: skip
    computations.append(
      f'%{name} (p: f32[1,64]) -> f32[8,64] {{\n'
      f'  %p = f32[1,64]{{1,0}} parameter(0)\n'
      f'  {gather.format(name=f"{name}.1")}\n  {root}\n}}\n'
    )
  text = '\n'.join(computations) + program(
    '%x = f32[1,64]{1,0} parameter(0)',
    '%a = f32[8,64]{1,0} fusion(%x), kind=kCustom, calls=%begin',
    'ROOT %b = f32[8,64]{1,0} fusion(%x), kind=kCustom, calls=%go_on',
  )
  (found,) = hlo_costs.count(text).collectives
  assert found.count == 1


def test_gradients_between_slices_go_through_hosts():
  """As XLA:TPU writes an all-reduce over two slices of 8."""
  text = program(
    '%x = f32[16,64]{1,0} parameter(0)',
    '%token = token[] after-all()',
    '%s = (f32[16,64]{1,0}, u32[], token[]) send(%x, %token), channel_id=82, '
    'is_host_transfer=true, frontend_attributes={'
    '_xla_megascale_target="{1,2}x{0:7}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}',
    'ROOT %d = token[] send-done(%s), channel_id=82, is_host_transfer=true',
  )
  (found,) = hlo_costs.count(text).collectives
  assert found.kind == 'between slices'
  assert found.devices == (0, 8)
  assert found.num_bytes == 4 * 16 * 64


def test_a_slice_of_stacked_layers_is_all_that_is_read():
  text = """
%fused (stack: f32[24,64,64], i: s32[]) -> f32[1,64,64] {
  %stack = f32[24,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,64,64]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
}
""" + program(  # noqa: E501
    '%x = f32[24,64,64]{2,1,0} parameter(0)',
    '%i = s32[] parameter(1)',
    'ROOT %y = f32[1,64,64]{2,1,0} fusion(%x, %i), kind=kLoop, calls=%fused',
  )
  layer = 4 * 64 * 64
  assert hlo_costs.count(text).hbm_bytes == 2 * layer + 4


def test_a_batch_dimension_as_a_window():
  """XLA:TPU writes [8, 16, 64] x [8, 64, 32] so; padding is not multiplied."""
  text = program(
    '%x = f32[16,64,8]{1,0,2} parameter(0)',
    '%w = f32[64,32,8]{1,0,2} parameter(1)',
    'ROOT %y = f32[16,32,8]{1,0,2} convolution(%x, %w), '
    'window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=bf0_io0->bf0',
  )
  assert hlo_costs.count(text).flops == 2 * 8 * 16 * 64 * 32


def test_what_xla_writes_here():
  """Scanned layers of a real program: all of them, not one."""

  def call(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  shapes = jnp.zeros((16, 64)), jnp.zeros((12, 64, 64))
  compiled = jax.jit(call).lower(*shapes).compile()
  text = compiled.as_text()
  assert text and hlo_costs.count(text).flops == 12 * 2 * 16 * 64 * 64


def test_a_kernel_counts_by_its_estimate():
  """Of a kernel no instruction is seen; operands in S(1) are on the chip."""
  costs = hlo_costs.count(
    program(
      '%q = bf16[4,64,512]{2,1,0} parameter(0)',
      '%k = bf16[4,64,512]{2,1,0:S(1)} parameter(1)',
      'ROOT %o = bf16[4,64,512]{2,1,0} custom-call(%q, %k), '
      'custom_call_target="tpu_custom_call", backend_config={'
      '"custom_call_config":{"body":"AA","cost_estimate":{"flops":"4096",'
      '"transcendentals":"7","bytes_accessed":"9"}}}',
    )
  )
  assert costs.flops == 4096
  assert costs.hbm_bytes == 2 * 2 * 4 * 64 * 512


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule nothing')
