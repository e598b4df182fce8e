# SPDX-License-Identifier: Apache-2.0
"""The laws of the embedded translation task: fair, repeatable, no leaks."""

import collections
import datetime
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import unicodedata

import babel
import pytest

from l2s_jax.data import cldr

_PAIRS = list(itertools.combinations(cldr.SIZES, 2))


@pytest.fixture(scope='module')
def splits() -> dict[str, list[dict[str, str]]]:
  return {split: list(cldr.examples(split)) for split in cldr.SIZES}


def test_splits_have_their_sizes(splits):
  for split, examples in splits.items():
    assert len(examples) == cldr.SIZES[split]


def test_prompts_come_again_after_24024_examples_and_no_sooner(splits):
  for examples in splits.values():
    prompts = [e['prompt'] for e in examples]
    for start in range(0, len(prompts), 24_024):
      window = prompts[start : start + 24_024]
      assert len(set(window)) == len(window)
  # As the docstring of `examples` says.
  assert len({e['prompt'] for e in splits['train']}) == 78_844


@pytest.mark.parametrize('one, other', _PAIRS)
def test_no_source_and_no_answer_is_in_two_splits(splits, one, other):
  def sources(split):
    return {e['source'] for e in splits[split]}

  def answers(split):
    return {(e['language'], e['answer']) for e in splits[split]}

  assert not sources(one) & sources(other)
  assert not answers(one) & answers(other)


def test_splits_of_different_seeds_are_disjoint_too(splits):
  train = {
    e['source'] for e in cldr.examples('train', seed=1, num_examples=24_000)
  }
  assert train != {e['source'] for e in splits['train']}
  assert not train & {e['source'] for e in splits['test']}
  assert not train & {e['source'] for e in splits['validation']}


def test_a_day_of_test_is_in_train_in_no_style(splits):
  def days(split):
    for e in splits[split]:
      if e['kind'] in ('date', 'datetime') and e['language'] == 'fr':
        digits = e['answer'].split(' ')[0].split('/')
        if len(digits) == 3:  # '09/07/2013', the short style
          yield datetime.date(*map(int, reversed(digits)))

  held_out = set(days('test')) | set(days('validation'))
  assert held_out
  assert not held_out & set(days('train'))
  for day in held_out:
    english = f'{day:%B} {day.day}, {day.year}'
    assert cldr.split_of(('date', day.isoformat())) != 'train'
    assert not any(english in e['source'] for e in splits['train'])


def test_one_prompt_has_one_answer_whatever_the_seed(splits):
  answers = {e['prompt']: e['answer'] for e in splits['train']}
  repeated = 0
  for e in cldr.examples('train', seed=1, num_examples=24_000):
    repeated += e['prompt'] in answers
    assert answers.setdefault(e['prompt'], e['answer']) == e['answer']
  assert repeated > 1_000


@pytest.mark.parametrize('split', cldr.SIZES)
def test_every_round_holds_each_kind_in_each_language_once(splits, split):
  cells = set(itertools.product(cldr.KINDS, cldr.LANGUAGES))
  examples = splits[split]
  for start in range(0, len(examples) - len(cells) + 1, len(cells)):
    found = examples[start : start + len(cells)]
    assert {(e['kind'], e['language']) for e in found} == cells


def test_a_reader_of_every_third_example_meets_every_language(splits):
  for first in range(3):
    counts = collections.Counter(
      e['language'] for e in splits['train'][first::3]
    )
    assert min(counts[language] for language in cldr.LANGUAGES) > 2_400


def test_fewer_examples_are_a_prefix(splits):
  assert list(cldr.examples('train', num_examples=50)) == splits['train'][:50]
  assert not list(cldr.examples('test', num_examples=0))


def test_hash_seed_time_zone_and_locale_change_nothing(splits):
  script = (
    'import hashlib, json; from l2s_jax.data import cldr; '
    'examples = list(cldr.examples("validation")); '
    'print(hashlib.sha256(json.dumps(examples).encode()).hexdigest())'
  )
  expected = hashlib.sha256(
    json.dumps(splits['validation']).encode()
  ).hexdigest()
  for environment in (
    {'PYTHONHASHSEED': '1', 'TZ': 'Asia/Tokyo', 'LC_ALL': 'C'},
    {'PYTHONHASHSEED': '2', 'TZ': 'America/Lima', 'LANG': 'de_DE.UTF-8'},
  ):
    found = subprocess.run(
      [sys.executable, '-c', script],
      text=True,
      check=True,
      capture_output=True,
      env={
        **os.environ,
        'PYTHONPATH': os.pathsep.join(sys.path),
        **environment,
      },
    )
    assert found.stdout.strip() == expected


def test_texts_are_short_and_plain(splits):
  for e in itertools.chain(*splits.values()):
    assert e['prompt'] == (
      f'translate English to {cldr.LANGUAGES[e["language"]]}: {e["source"]}'
    )
    for text in (e['source'], e['answer']):
      assert 0 < len(text) <= 60
      assert len(text.split()) <= 10
      assert text == ' '.join(text.split())
      # What SentencePiece would make of it.
      assert text == unicodedata.normalize('NFKC', text)
      # Babel writes the unit's own name where CLDR has no form for it.
      assert not any(unit in text for unit in cldr._UNITS)


def test_names_alone_are_in_train_only(splits):
  def alone(split):
    return {
      e['source']
      for e in splits[split]
      if e['kind'] in ('countries', 'languages')
      and not {'and', 'or'} & set(e['source'].split())
    }

  assert {'Germany', 'Romania', 'French'} <= alone('train')
  assert not alone('validation')
  assert not alone('test')


@pytest.mark.parametrize('language', cldr.LANGUAGES)
def test_every_name_is_in_train(splits, language):
  text = ' '.join(
    e['answer'] for e in splits['train'] if e['language'] == language
  )
  locale = babel.Locale.parse(language)
  for code in cldr._COUNTRIES:
    assert locale.territories[code] in text
  for code in cldr._LANGUAGES:
    assert locale.languages[code] in text


def _train(splits, kind, language):
  return [
    (e['source'], e['answer'])
    for e in splits['train']
    if e['kind'] == kind and e['language'] == language
  ]


def test_short_dates_agree(splits):
  found = 0
  for source, answer in _train(splits, 'date', 'fr'):
    if match := re.fullmatch(r'(\d\d)/(\d\d)/(\d{4})', answer):
      day, month, year = map(int, match.groups())
      assert 1950 <= year < 2050
      assert source == f'{month}/{day}/{year % 100:02}'
      found += 1
  assert found > 50


@pytest.mark.parametrize('language', cldr.LANGUAGES)
def test_twelve_hours_become_twenty_four(splits, language):
  for source, answer in _train(splits, 'time', language):
    clock, half = source.split(' ')
    hour, rest = clock.split(':', 1)
    assert answer == f'{int(hour) % 12 + 12 * (half == "PM"):02}:{rest}'


@pytest.mark.parametrize(
  'language, miles', [('de', 'Meilen'), ('fr', 'miles'), ('ro', 'mile')]
)
def test_units_keep_their_number(splits, language, miles):
  number = r'\d+(?:[.,]\d)?'
  for source, answer in _train(splits, 'unit', language):
    value = re.findall(number, source)[0].replace('.', ',')
    assert re.findall(number, answer)[0] == value
    if source.endswith('miles'):
      assert answer in (f'{value} {miles}', f'{value} de {miles}')


def test_cents_decide_the_plural(splits):
  answers = [answer for _, answer in _train(splits, 'currency', 'ro')]
  assert any(re.search(r'\d de \w', answer) for answer in answers)
  assert not any(re.search(r',\d\d de \w', answer) for answer in answers)


def _renderings(kind: str, content: cldr.Content) -> set[tuple[str, ...]]:
  """Returns the texts of a content in en, de, fr and ro, in every style."""
  rng = random.Random(0)
  locales = [babel.Locale.parse(name) for name in ('en', *cldr.LANGUAGES)]
  found = set()
  for _ in range(100_000):
    contents, render = cldr.KINDS[kind](rng)
    if contents[0] == content:
      found.add(tuple(cldr._plain(render(locale)) for locale in locales))
  return found


# As CLDR 47 (Babel 2.18) and num2words 0.5.14 have them, checked by eye.
@pytest.mark.parametrize(
  'kind, content, expected',
  [
    ('date', ('day', 7, 9), {('July 9', '9. Juli', '9 juillet', '9 iulie')}),
    (
      'date',
      ('quarter', 1997, 3),
      {
        (
          '3rd quarter 1997',
          '3. Quartal 1997',
          '3e trimestre 1997',
          'trimestrul al III-lea 1997',
        )
      },
    ),
    (
      'duration',
      ('duration', 3, 'day'),
      {('3 days', '3 Tage', '3 jours', '3 zile')},
    ),
    (
      'duration',
      ('duration', 21, 'hour'),
      {
        ('21 hours', '21 Stunden', '21 heures', '21 de ore'),
        ('21 hr', '21 Std.', '21 h', '21 ore'),
      },
    ),
    (
      'duration',
      ('durations', 2, 'hour', 5, 'minute'),
      {
        (
          '2 hours, 5 minutes',
          '2 Stunden, 5 Minuten',
          '2 heures et 5 minutes',
          '2 ore și 5 minute',
        )
      },
    ),
    (
      'relative',
      ('duration', 3, 'day'),
      {
        ('in 3 days', 'in 3 Tagen', 'dans 3 jours', 'peste 3 zile'),
        ('3 days ago', 'vor 3 Tagen', 'il y a 3 jours', 'acum 3 zile'),
      },
    ),
    (
      'cardinal',
      ('number', 81),
      {('eighty-one', 'einundachtzig', 'quatre-vingt-un', 'optzeci și unu')},
    ),
    (
      'ordinal',
      ('number', 3),
      {('third', 'dritte', 'troisième', 'al treilea')},
    ),
    (
      'currency',
      ('amount', 'JPY', 2_100),
      {
        ('¥21', '21 ¥', '21 JPY', '21 JPY'),
        (
          '21 Japanese yen',
          '21 Japanische Yen',
          '21 yens japonais',
          '21 de yeni japonezi',
        ),
      },
    ),
    (
      'countries',
      ('name', 'NL'),
      {('Netherlands', 'Niederlande', 'Pays-Bas', 'Țările de Jos')},
    ),
    (
      'languages',
      ('names', 'da', 'nl'),
      {
        (
          'Danish and Dutch',
          'Dänisch und Niederländisch',
          'danois et néerlandais',
          'daneză și neerlandeză',
        ),
        (
          'Danish or Dutch',
          'Dänisch oder Niederländisch',
          'danois ou néerlandais',
          'daneză sau neerlandeză',
        ),
        (
          'Dutch and Danish',
          'Niederländisch und Dänisch',
          'néerlandais et danois',
          'neerlandeză și daneză',
        ),
        (
          'Dutch or Danish',
          'Niederländisch oder Dänisch',
          'néerlandais ou danois',
          'neerlandeză sau daneză',
        ),
      },
    ),
  ],
)
def test_contents_render_as_cldr_has_them(kind, content, expected):
  assert _renderings(kind, content) == expected


def test_contents_stay_in_their_splits():
  held_out = {7: 'test', 12: 'test', 17: 'test', 19: 'validation'}
  for number in range(20):
    assert cldr.split_of(('number', number)) == held_out.get(number, 'train')


def test_unknown_split_is_refused_at_once():
  with pytest.raises(ValueError, match=r"no split 'dev'.*'validation'"):
    cldr.examples('dev')


def test_more_examples_than_there_are_is_refused_at_once():
  with pytest.raises(ValueError, match='1001: .*expected 0 to 1000'):
    cldr.examples('test', num_examples=1001)
