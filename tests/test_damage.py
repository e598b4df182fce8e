# SPDX-License-Identifier: Apache-2.0
"""What is damaged is found; the long form is `faults/damage.py`."""

import concurrent.futures
import gc
import json
import pathlib
import re
import sys

import cache_files
import forked
import numpy as np
import pytest
from faults import damage, folders

from l2s_jax.caching import cache_writer
from l2s_jax.data.cached import cache_format

TESTS = pathlib.Path(__file__).parent
READERS = (
  'resume',
  'infer, evaluate',
  'LLM of a run',
  'convert --to=hf',
  'convert --to=l2s',
  'train from a cache',
  'cache again',
  'infer from a bundle',
  'infer from an export',
)


@pytest.mark.parametrize('every', [24, pytest.param(8, marks=pytest.mark.long)])
def test_no_damaged_file_is_read_as_if_it_were_good(every):
  """In a process of its own, which has one device, as a user's has."""
  result = forked.run(
    [
      sys.executable,
      *('-m', 'faults.damage', '--flips=1', f'--every={every}', '--seed=1'),
      *('--readers', *READERS),
    ],
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
  total = result.stdout.splitlines()[-1].split('|')
  assert total[1].strip() == 'all'
  assert int(total[2]) >= 480 / every
  assert total[-3].strip() == total[-2].strip() == '0'


def test_the_table_of_the_page_is_the_drivers_and_has_no_bad_outcome():
  page = (TESTS.parent / 'docs' / 'reliability.md').read_text()
  begin, end = '<!-- damage by file -->', '<!-- end of damage by file -->'
  header, _, *rows = page.split(begin)[1].split(end)[0].split('\n')[2:-2]
  assert header == f'| file | {" | ".join(damage.KINDS.values())} |'
  found = {row.split('`')[1] for row in rows}
  run = {'run/best.json', 'run/metrics.jsonl', 'run/model.json'}
  assert run <= found
  folders_of = {folder for folder, _ in folders.READERS.values()}
  assert {name.partition('/')[0] for name in found} == folders_of
  by_reader = page.split('<!-- damage by reader -->')[1]
  by_reader = by_reader.split('<!-- end of damage by reader -->')[0]
  readers = re.findall(r'^\| ([^|]+) \|.* 0 \| 0 \|$', by_reader, re.M)
  assert set(readers) == {*folders.READERS, 'all'}
  kinds = {pathlib.Path(name).name.split('-')[0] for name in found}
  assert {'metrics', 'local', '.local'} <= kinds
  words = set(re.findall(r'\d (\w+)', ' '.join(rows)))
  assert words <= set(damage.OUTCOMES) - set(damage.BAD)


@pytest.fixture
def cache(tmp_path):
  examples = cache_files.random_examples(5)
  return cache_files.write(
    tmp_path / 'cache', {'one': {'train': examples}}, num_shards=1
  )


@pytest.mark.parametrize('header', [b"{'descr': '<u4'(", b"{'descr': '<u4' "])
def test_an_index_whose_header_is_no_python_is_named(cache, header):
  (path,) = cache.rglob('*.index.npy')
  content = path.read_bytes()
  path.write_bytes(content[:10] + header + content[10 + len(header) :])
  split = cache_format.open_cache(cache).split('one', 'train')
  with pytest.raises(ValueError, match=f'{re.escape(str(path))} is not the in'):
    split.read([0])


class _Garbage:
  """Is collected by Python code, during which other threads may run."""

  def __init__(self):
    self.itself = self

  def __del__(self):
    sum(range(20))


def test_many_threads_open_indexes(cache):
  """In Python 3.11 some of them failed, at a collection of garbage."""
  (path,) = cache.rglob('*.index.npy')

  def load(_):
    _Garbage()
    return cache_format.load_index(str(path), 5).shape

  threshold, interval = gc.get_threshold(), sys.getswitchinterval()
  gc.set_threshold(1)
  sys.setswitchinterval(1e-6)
  try:
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
      shapes = list(threads.map(load, range(1000)))
  finally:
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)
  assert set(shapes) == {(5, 3)}


def test_lengths_damaged_before_the_cache_was_complete_are_named(cache):
  """The digest in `cache.json` is then that of the damaged index."""
  (path,) = cache.rglob('*.index.npy')
  index = np.load(path)
  index[3, 0] ^= 1
  np.save(path, index)
  plan = dict(cache_format.open_cache(cache).content)
  plan = json.loads(json.dumps(plan))
  del plan['tasks']['one']['splits']['train']['index_digests']
  cache_writer.finish(cache, plan)
  split = cache_format.open_cache(cache).split('one', 'train')
  split.read([0, 1, 2, 4])
  with pytest.raises(ValueError, match='record 3 of 5 .* its lengths are not'):
    split.read([3])
