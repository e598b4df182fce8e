# SPDX-License-Identifier: Apache-2.0
"""Translation examples generated from the Unicode CLDR, for the quickstart.

The task translates English into German, French and Romanian and needs no
download. A generator draws a content (a date, an amount, a list of countries);
Babel (the CLDR library) or num2words renders it in both languages. Examples are
short, exact and learnable in minutes on a CPU. Scores show that training works;
they do not measure real translation.

A *content* is the language-independent value of an example: a day, a month, a
time of day, a number, `('amount', 'EUR', 2150)`. A hash of the content alone
decides the split; style, language and seed do not. A `test` content is thus in
`train` in no style and no language. Rules:

- A rendering that loses information is keyed by the remaining information:
  'July 9' by month and day, '3 days' and '3 days ago' by (3, day), a time with
  seconds by hour and minute.
- A date with a time belongs to a split only if both its parts do.
- A list or a two-part duration is a content of its own, independent of order;
  its parts may occur in `train`. Single names are in `train` only, because
  names are a closed set; `validation` and `test` hold unseen combinations.
"""

import datetime
import decimal
import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Literal

import babel
import num2words
from babel import dates, lists, numbers, units

LANGUAGES = {'de': 'German', 'fr': 'French', 'ro': 'Romanian'}
SIZES = {'train': 96_000, 'validation': 1_000, 'test': 1_000}

Content = tuple[str | int, ...]
# The contents of an example, all of one split, and their renderer by locale.
Drawing = tuple[list[Content], Callable[[babel.Locale], str]]
DateStyle = Literal['short', 'medium', 'long', 'full']
TimeUnit = Literal['year', 'month', 'week', 'day', 'hour', 'minute', 'second']

# 728 rounds of all kinds in all languages. A language has 1,250 relative times
# in `train`, and a round takes one: many more rounds must repeat some.
_NUM_DISTINCT = 24_024

_NUM_BUCKETS = 20
_HELD_OUT_BUCKETS = {0: 'validation', 1: 'test'}

# 100 years: the two-digit year of a short date is unambiguous.
_FIRST_DAY = datetime.date(1950, 1, 1)
_NUM_DAYS = (datetime.date(2050, 1, 1) - _FIRST_DAY).days
_SECONDS: dict[TimeUnit, int] = {
  'year': 365 * 86400,
  'month': 30 * 86400,
  'week': 7 * 86400,
  'day': 86400,
  'hour': 3600,
  'minute': 60,
  'second': 1,
}
_COMPOUNDS: tuple[tuple[TimeUnit, TimeUnit, int], ...] = (
  ('year', 'month', 12),
  ('week', 'day', 7),
  ('day', 'hour', 24),
  ('hour', 'minute', 60),
  ('minute', 'second', 60),
)
_CURRENCIES = 'USD EUR GBP JPY CHF RON CAD PLN SEK CZK'.split()
# Units with long and short forms in all four languages. Babel lacks, for
# example, a Romanian 'kWh' in words and French cups.
_UNITS = (
  'length-kilometer length-centimeter length-millimeter length-mile '
  'length-foot length-inch length-yard mass-kilogram mass-ounce mass-pound '
  'mass-tonne volume-milliliter volume-gallon temperature-celsius '
  'temperature-fahrenheit speed-kilometer-per-hour speed-mile-per-hour '
  'speed-meter-per-second power-watt power-kilowatt electric-volt '
  'digital-megabyte digital-gigabyte frequency-hertz area-hectare'
).split()
_COUNTRIES = (
  'AL AM AR AT AU BE BG BR BY CA CH CL CN CO CU CY CZ DE DK DZ EC EE EG ES '
  'ET FI FR GE GR HR HU ID IE IN IQ IS IT JM JO JP KE KH KR LB LT LU LV LY '
  'MA MN MX NG NL NO NP PE PH PK PL PT RO RS RU SE SI SK SN SY TD TH TN TR '
  'UA UZ VN YE ZA'
).split()
_LANGUAGES = (
  'ar be bg ca cs da de el en es et eu fa fi fr ga he hi hr hu hy id is it '
  'ja ka ko la lt lv mn nl no pl pt ro ru sk sl sq sr sv th tr uk vi '
  'zh'
).split()


def examples(
  split: str, *, seed: int = 0, num_examples: int | None = None
) -> Iterator[dict[str, str]]:
  """Returns a lazy iterator over the examples of a split.

  Each is `{'prompt': 'translate English to German: 3 days', 'answer': '3 Tage',
  'source': '3 days', 'language': 'de', 'kind': 'duration'}`. A prompt occurs
  once in the first 24,024 examples, once in the next 24,024, and so on; the
  `train` split has 78,844 prompts. Each run of `len(KINDS) * len(LANGUAGES)`
  examples holds each kind in each language once, so any prefix is a balanced
  sample. Examples depend only on the arguments and on the versions of Babel and
  num2words.

  Args:
    split: 'train', 'validation' or 'test'.
    seed: seed of the generator. The split of a content does not depend on it,
      so splits of different seeds are disjoint as well.
    num_examples: number of examples. None: `SIZES[split]`, also the maximum.

  Raises:
    ValueError: if there is no such split or it is smaller than `num_examples`.
  """
  if split not in SIZES:
    raise ValueError(
      f'no split {split!r} in the CLDR task; choose one of {list(SIZES)}.'
    )
  if num_examples is None:
    num_examples = SIZES[split]
  if not 0 <= num_examples <= SIZES[split]:
    raise ValueError(
      f'num_examples={num_examples}: the CLDR split {split!r} has '
      f'{SIZES[split]} examples; expected 0 to {SIZES[split]}.'
    )
  return itertools.islice(_generate(split, seed), num_examples)


def split_of(content: Content) -> str:
  """Assigns a content to a split by hash: 90 % 'train', 5 % each held out."""
  if content[0] == 'name':
    return 'train'
  text = ' '.join(map(str, content))
  digest = hashlib.sha256(text.encode()).digest()
  bucket = int.from_bytes(digest[:8], 'big') % _NUM_BUCKETS
  return _HELD_OUT_BUCKETS.get(bucket, 'train')


def _generate(split: str, seed: int) -> Iterator[dict[str, str]]:
  rng = random.Random(f'{split} {seed}')
  cells = list(itertools.product(KINDS, LANGUAGES))
  seen: set[str] = set()
  while True:
    # A fixed order would give each of three hosts examples of one language.
    rng.shuffle(cells)
    if len(seen) == _NUM_DISTINCT:
      seen.clear()
    for kind, language in cells:
      example = _draw_example(rng, split, kind, language, seen)
      seen.add(example['prompt'])
      yield example


def _draw_example(
  rng: random.Random, split: str, kind: str, language: str, seen: Set[str]
) -> dict[str, str]:
  while True:
    contents, render = KINDS[kind](rng)
    if all(split_of(content) == split for content in contents):
      source = _plain(render(_locale('en')))
      prompt = f'translate English to {LANGUAGES[language]}: {source}'
      if prompt not in seen:
        break
  return {
    'prompt': prompt,
    'answer': _plain(render(_locale(language))),
    'source': source,
    'language': language,
    'kind': kind,
  }


@functools.cache
def _locale(language: str) -> babel.Locale:
  """Returns a locale that Babel need not look for at each of its calls."""
  return babel.Locale.parse(language)


def _plain(text: str) -> str:
  """Replaces CLDR's no-break and narrow spaces by plain spaces.

  SentencePiece normalizes them to plain spaces, so a decoded answer could never
  equal a reference with special spaces.
  """
  return ' '.join(text.split())


def _draw_day(rng: random.Random) -> tuple[datetime.date, Content]:
  day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_NUM_DAYS))
  return day, ('date', day.isoformat())


def _draw_minute(rng: random.Random) -> tuple[datetime.time, Content]:
  time = datetime.time(rng.randrange(24), rng.randrange(60), rng.randrange(60))
  return time, ('time', time.hour, time.minute)


def _unambiguous(style: DateStyle, day: datetime.date) -> DateStyle:
  """Returns the style, or 'long' where 'medium' is ambiguous in English.

  May has no abbreviation: 'May 9, 2013' is both the medium and the long style,
  '09.05.2013' and '9. Mai 2013' in German. A prompt must have one answer.
  """
  return 'long' if style == 'medium' and day.month == 5 else style


def _draw_date(rng: random.Random) -> Drawing:
  day, content = _draw_day(rng)
  if rng.random() < 0.6:
    style = _unambiguous(rng.choice(('short', 'medium', 'long', 'full')), day)
    return [content], lambda locale: dates.format_date(day, style, locale)
  skeleton, part = rng.choice(
    (
      ('yMMMM', ('month', day.year, day.month)),
      ('MMMMd', ('day', day.month, day.day)),
      ('yQQQQ', ('quarter', day.year, (day.month + 2) // 3)),
    )
  )
  moment = datetime.datetime.combine(day, datetime.time())
  return [part], lambda locale: dates.format_skeleton(
    skeleton, moment, locale=locale
  )


def _draw_time(rng: random.Random) -> Drawing:
  time, content = _draw_minute(rng)
  style = rng.choice(('short', 'medium'))
  return [content], lambda locale: dates.format_time(time, style, locale=locale)


def _draw_datetime(rng: random.Random) -> Drawing:
  day, day_content = _draw_day(rng)
  time, time_content = _draw_minute(rng)
  style = _unambiguous(rng.choice(('short', 'medium', 'long')), day)

  def render(locale: babel.Locale) -> str:
    # `format_datetime` would add the time zone to a long time.
    return str(dates.get_datetime_format(style, locale)).format(
      dates.format_time(time, 'short', locale=locale),
      dates.format_date(day, style, locale),
    )

  return [day_content, time_content], render


@functools.cache
def _format_duration(
  count: int,
  unit: TimeUnit,
  locale: babel.Locale,
  *,
  style: Literal['long', 'short'] = 'long',
  add_direction: bool = False,
) -> str:
  # An infinite threshold keeps the unit: 90 seconds, not 2 minutes.
  return dates.format_timedelta(
    datetime.timedelta(seconds=count * _SECONDS[unit]),
    granularity=unit,
    threshold=math.inf,
    add_direction=add_direction,
    format=style,
    locale=locale,
  )


def _draw_duration(rng: random.Random) -> Drawing:
  if rng.random() < 0.5:
    large, small, limit = rng.choice(_COMPOUNDS)
    first, second = rng.randrange(1, 31), rng.randrange(1, limit)
    content = ('durations', first, large, second, small)
    return [content], lambda locale: lists.format_list(
      [
        _format_duration(first, large, locale),
        _format_duration(second, small, locale),
      ],
      style='unit',
      locale=locale,
    )
  count, unit = rng.randrange(1, 100), rng.choice(list(_SECONDS))
  # English has one style for days, '3 days'; the other languages have two.
  style: Literal['long', 'short'] = (
    'long' if unit == 'day' else rng.choice(('long', 'short'))
  )
  return [('duration', count, unit)], functools.partial(
    _format_duration, count, unit, style=style
  )


def _draw_relative(rng: random.Random) -> Drawing:
  count, unit = rng.randrange(1, 100), rng.choice(list(_SECONDS))
  sign = rng.choice((1, -1))
  return [('duration', count, unit)], functools.partial(
    _format_duration, sign * count, unit, add_direction=True
  )


def _draw_number(rng: random.Random) -> int:
  return rng.randrange(rng.choice((100, 1_000, 10_000)))


@functools.cache
def _format_number(number: int, kind: str, locale: babel.Locale) -> str:
  return num2words.num2words(number, lang=locale.language, to=kind)


def _draw_cardinal(rng: random.Random) -> Drawing:
  number = _draw_number(rng)
  return [('number', number)], functools.partial(
    _format_number, number, 'cardinal'
  )


def _draw_ordinal(rng: random.Random) -> Drawing:
  number = _draw_number(rng)
  # num2words renders some ordinals wrongly ('deux centsième',
  # 'quatre-vingtsième', 'al optlea') and has no sensible zeroth.
  while number % 100 in (0, 80) or (number % 10 == 8 and number % 100 != 18):
    number = _draw_number(rng)
  return [('number', number)], functools.partial(
    _format_number, number, 'ordinal'
  )


def _draw_currency(rng: random.Random) -> Drawing:
  currency = rng.choice(_CURRENCIES)
  style: Literal['standard', 'name'] = rng.choice(('standard', 'name'))
  has_cents = currency != 'JPY' and rng.random() < 0.5
  limit = rng.choice((100, 1_000, 10_000))
  # Decimal keeps the zeros of 21.00. The plural depends on them: Romanian has
  # '21 de lei' and '21,00 lei'.
  if has_cents:
    cents = rng.randrange(1, 100 * limit)
    amount = decimal.Decimal(cents).scaleb(-2)
  else:
    amount = decimal.Decimal(rng.randrange(1, limit))
    cents = 100 * int(amount)
  return [('amount', currency, cents)], lambda locale: numbers.format_currency(
    amount,
    currency,
    locale=locale,
    format_type=style,
    currency_digits=style == 'standard' or has_cents,
  )


def _draw_unit(rng: random.Random) -> Drawing:
  unit = rng.choice(_UNITS)
  length: Literal['long', 'short'] = rng.choice(('long', 'short'))
  # Excludes 1: Babel abbreviates '1 Meile' to '1 Meilen'. Excludes 21.0: CLDR
  # writes it '21', but with another Romanian plural than 21.
  if rng.random() < 0.5:
    tenths = 10 * rng.randrange(2, 1_000)
    value = decimal.Decimal(tenths // 10)
  else:
    tenths = 10 * rng.randrange(1, 100) + rng.randrange(1, 10)
    value = decimal.Decimal(tenths).scaleb(-1)
  return [('measure', unit, tenths)], lambda locale: units.format_unit(
    value, unit, length, locale=locale
  )


def _draw_names(
  rng: random.Random,
  codes: list[str],
  names_in: Callable[[babel.Locale], Mapping[str, str]],
) -> Drawing:
  chosen = rng.sample(codes, rng.choice((1, 2, 2, 3, 3)))
  style: Literal['standard', 'or'] = rng.choice(('standard', 'or'))
  content: Content = ('name' if len(chosen) == 1 else 'names', *sorted(chosen))

  def render(locale: babel.Locale) -> str:
    names = names_in(locale)
    return lists.format_list(
      [names[code] for code in chosen], style=style, locale=locale
    )

  return [content], render


def _draw_countries(rng: random.Random) -> Drawing:
  return _draw_names(rng, _COUNTRIES, lambda locale: locale.territories)


def _draw_languages(rng: random.Random) -> Drawing:
  return _draw_names(rng, _LANGUAGES, lambda locale: locale.languages)


KINDS: dict[str, Callable[[random.Random], Drawing]] = {
  'date': _draw_date,
  'time': _draw_time,
  'datetime': _draw_datetime,
  'duration': _draw_duration,
  'relative': _draw_relative,
  'cardinal': _draw_cardinal,
  'ordinal': _draw_ordinal,
  'currency': _draw_currency,
  'unit': _draw_unit,
  'countries': _draw_countries,
  'languages': _draw_languages,
}
