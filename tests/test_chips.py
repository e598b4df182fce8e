# SPDX-License-Identifier: Apache-2.0
"""Laws of chips: data takes the links that there are."""

import itertools

import pytest

from l2s_jax.runtime import chips


def coords(slice_, *, slices=1):
  """Places of all chips, slice first."""
  axes = [range(n) for n in (slices, *slice_.shape)]
  return list(itertools.product(*axes))


@pytest.mark.parametrize(
  'topology,num_chips,wraps',
  [
    ('v5e:2x4', 8, (False, False)),
    ('v5e:8x16', 128, (False, True)),
    ('v6e:16x16', 256, (True, True)),
    ('v5p:4x4x4', 64, (True, True, True)),
    ('v5p:2x4x4', 32, (False, False, False)),
  ],
)
def test_topologies(topology, num_chips, wraps):
  found = chips.find(topology)
  assert found.name == topology
  assert found.num_chips == num_chips
  assert found.wraps == wraps


@pytest.mark.parametrize(
  'topology,name',
  [
    ('v5e:2x4', 'v5litepod-8'),
    ('v6e:16x16', 'v6e-256'),
    ('v5p:4x4x4', 'v5p-128'),
  ],
)
def test_what_google_calls_a_slice(topology, name):
  assert chips.find(topology).accelerator_type == name


def test_no_slice_is_larger_than_a_pod():
  with pytest.raises(ValueError, match='larger than a pod of v5e, 16x16'):
    chips.find('v5e:32x16')


@pytest.mark.parametrize(
  'topology', ['v5e', 'v5e:8', 'v5p:4x4', 'h100:8', 'v9:2x2', 'v5e:0x4']
)
def test_no_topology(topology):
  with pytest.raises(ValueError, match='such as v5e:2x4') as caught:
    chips.find(topology)
  assert topology in str(caught.value)


def test_links_of_a_slice_without_a_torus():
  """2 x 4 chips: at a corner one link along each axis."""
  found = chips.find('v5e:2x4')
  link = found.chip.link_bytes_per_sec
  assert found.seconds(1e9, coords(found)) == pytest.approx(1e9 / (2 * link))
  column = [(0, 0, i) for i in range(4)]
  assert found.seconds(1e9, column) == pytest.approx(1e9 / link)
  assert found.seconds(1e9, [(0, 0, 0)]) == 0


def test_links_of_a_torus():
  """Two links along each axis that the chips go around."""
  found = chips.find('v5p:4x4x4')
  link = found.chip.link_bytes_per_sec
  assert found.seconds(1e9, coords(found)) == pytest.approx(1e9 / (6 * link))
  half = [(0, 0, 0, i) for i in range(2)]
  assert found.seconds(1e9, half) == pytest.approx(1e9 / link)


def test_slices_share_what_comes_over_the_network():
  """An all-gather of 8 GB over two slices of 8: 4 GB, half a GB a chip."""
  found = chips.find('v5e:2x4', num_slices=2)
  gathered = 8e9
  secs = found.seconds(gathered * 15 / 16, coords(found, slices=2))
  assert secs == pytest.approx(0.5e9 / found.chip.network_bytes_per_sec)
  assert found.num_chips == 16


def test_a_permute_between_slices_is_not_shared():
  found = chips.find('v5e:2x4', num_slices=2)
  pair = [(0, 0, 0), (1, 0, 0)]
  secs = found.seconds(1e9, pair, is_permute=True)
  assert secs == pytest.approx(1e9 / found.chip.network_bytes_per_sec)


def test_figures_agree_with_what_their_makers_sell():
  """An all-gather cannot outrun memory, nor the network the links."""
  for chip in chips.CHIPS.values():
    assert (
      chip.network_bytes_per_sec
      < chip.link_bytes_per_sec
      < chip.hbm_bytes_per_sec
      < chip.flops_per_sec
    )
    assert chip.source.startswith('https://')


@pytest.mark.parametrize(
  'kind,name',
  [
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6 lite', 'v6e'),
    ('NVIDIA H200', 'h200'),
    ('NVIDIA A100-SXM4-80GB', 'a100'),
  ],
)
def test_chips_by_what_jax_calls_them(kind, name):
  assert chips.of_device(kind) is chips.CHIPS[name]
  assert chips.of_device('cpu') is None
