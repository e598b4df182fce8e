# SPDX-License-Identifier: Apache-2.0
"""Breaks JSON and bytes as disks, editors, downloads and people do.

All is drawn from `rng`: the same seed gives the same faults.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# What may stand in the place of any value.
STRANGE: tuple[Any, ...] = (
  None,
  True,
  False,
  0,
  -1,
  1,
  3,
  2**31,
  2**63,
  -(2**63) - 1,
  10**30,
  0.5,
  -0.0,
  1e300,
  '',
  ' ',
  'x',
  '0',
  'None',
  '../../x',
  'ș' * 3,
  '\x00',
  '(',
  'a' * 5000,
  [],
  {},
  [[]],
  [None],
  [1, 'a'],
  {'': None},
  {'type': 'x'},
)
# What JSON cannot say but files hold all the same.
_LITERALS = (
  'NaN',
  '-Infinity',
  '1e999',
  '9' * 5000,
  '"\\ud800"',
  "'x'",
  'undefined',
  '01',
  '[' * 100_000,
  '{"a":' * 3000,
  '{"a": 1, "a": 2}',
  '[1,]',
  '/* x */ 1',
)
_BYTES = (b'', b'\x00', b'\xff', b'\xfe\xff', b'\xed\xa0\x80', b'"', b'}', b'{')
# Of counts, lengths and offsets in binary headers.
_NUMBERS = (0, 1, 2, 8, 255, 2**31 - 1, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
_Holder = Any  # A dict or a list.


def mutate_json(value: Any, rng: random.Random) -> Any:
  """Returns a copy of a JSON value with one to three faults.

  A value anywhere in it becomes another (of another type, too large, negative,
  empty), goes away, stands twice, or changes places with a sibling; a key is
  renamed.
  """
  value = copy.deepcopy(value)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    value = _mutate_once(value, rng)
  return value


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
  """Returns the bytes with one fault: cut, flipped, dropped, twice, strange.

  Or with a number in them that no count or length should be.
  """
  place = rng.randrange(len(content) + 1)
  end = min(len(content), place + rng.choice((1, 2, 8, 64, 512)))
  kind = rng.randrange(9)
  if kind == 0:
    return content[:place]
  if kind == 1:
    return content[place:]
  if kind == 2:
    return content[:place] + content[end:]
  if kind == 3:
    return content[:end] + content[place:]
  if kind == 4:
    return content[:place] + rng.choice(_BYTES) + content[place:]
  if kind == 5:
    return content[:place] + rng.randbytes(end - place) + content[end:]
  if kind == 6:
    return rng.choice((b'', b'\xef\xbb\xbf' + content, bytes(len(content))))
  if kind == 7:
    width = rng.choice((1, 4, 8))
    number = rng.choice(_NUMBERS) % 2 ** (8 * width)
    end = place + width
    return content[:place] + number.to_bytes(width, 'little') + content[end:]
  flipped = bytearray(content)
  for _ in range(rng.choice((1, 1, 3, 20))):
    if flipped:
      flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
  return bytes(flipped)


def mutate_json_file(content: bytes, rng: random.Random) -> bytes:
  """Returns what a broken JSON file may hold: any fault of this module."""
  kind = rng.randrange(8)
  if kind <= 1:
    return mutate_bytes(content, rng)
  value = json.loads(content)
  if kind == 2:
    marker = f'marker {rng.random()}'
    text = json.dumps(_replace(copy.deepcopy(value), rng, marker))
    literal = rng.choice(_LITERALS)
    return text.replace(json.dumps(marker), literal).encode()
  return json.dumps(
    mutate_json(value, rng), ensure_ascii=rng.random() < 0.5
  ).encode()


def _mutate_once(value: Any, rng: random.Random) -> Any:
  edit: Callable[[Any, random.Random], Any] = rng.choice(
    (_strange, _strange, _strange, _drop, _rename, _double, _swap, _nudge)
  )
  return edit(value, rng)


def _places(value: Any) -> list[tuple[_Holder, Any]]:
  """Returns each holder and key in a value; of a long holder a few alone."""
  places: list[tuple[_Holder, Any]] = []
  if isinstance(value, dict):
    keys: list[Any] = list(value)
  elif isinstance(value, list):
    keys = list(range(len(value)))
  else:
    return places
  for key in keys[:40] + keys[40:][-10:]:
    places.append((value, key))
    places += _places(value[key])
  return places


def _pick(value: Any, rng: random.Random) -> tuple[_Holder, Any] | None:
  places = _places(value)
  return rng.choice(places) if places else None


def _replace(value: Any, rng: random.Random, item: Any) -> Any:
  place = _pick(value, rng)
  if place is None:
    return item
  holder, key = place
  holder[key] = item
  return value


def _strange(value: Any, rng: random.Random) -> Any:
  return _replace(value, rng, copy.deepcopy(rng.choice(STRANGE)))


def _drop(value: Any, rng: random.Random) -> Any:
  place = _pick(value, rng)
  if place is not None:
    holder, key = place
    del holder[key]
  return value


def _rename(value: Any, rng: random.Random) -> Any:
  place = _pick(value, rng)
  if place is not None and isinstance(place[0], dict):
    holder, key = place
    new = rng.choice((key + '_', key.upper(), '', key[:-1], f' {key}'))
    holder[new] = holder.pop(key)
  return value


def _double(value: Any, rng: random.Random) -> Any:
  place = _pick(value, rng)
  if place is not None:
    holder, key = place
    item = copy.deepcopy(holder[key])
    if isinstance(holder, list):
      holder.insert(key, item)
    else:
      holder[f'{key} again'] = item
  return value


def _swap(value: Any, rng: random.Random) -> Any:
  place = _pick(value, rng)
  if place is not None:
    holder, key = place
    other = rng.choice(
      list(holder if isinstance(holder, dict) else range(len(holder)))
    )
    holder[key], holder[other] = holder[other], holder[key]
  return value


def _nudge(value: Any, rng: random.Random) -> Any:
  """Changes a number, a text or a list into one not far from it."""
  place = _pick(value, rng)
  if place is None:
    return value
  holder, key = place
  item = holder[key]
  if isinstance(item, bool):
    holder[key] = not item
  elif isinstance(item, int | float):
    holder[key] = rng.choice(
      (item + 1, item - 1, -item, item * 1000, str(item))
    )
  elif isinstance(item, str):
    holder[key] = rng.choice((item[:-1], item + 'x', item.upper(), [item]))
  elif isinstance(item, list):
    holder[key] = item[: len(item) // 2]
  return value
