# SPDX-License-Identifier: Apache-2.0
"""Laws of scores in all languages, and of the settings that choose them."""

import gin
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from rouge_score import tokenize as rouge_tokenize

from l2s_jax.data import tasks
from l2s_jax.metrics import bleu, metric_fns, rouge, scores, words
from l2s_jax.runtime import gin_config

# The same two sentences: the weather is fine today, let us walk to the park;
# she bought three red apples at the market.
LANGUAGES = {
  'English': [
    'The weather is fine today, let us walk to the park.',
    'She bought three red apples at the market.',
  ],
  'Chinese': ['今天天气很好，我们去公园散步吧。', '她在市场买了三个红苹果。'],
  'Japanese': [
    '今日は天気がいいので、公園へ散歩に行きましょう。',
    '彼女は市場で赤いりんごを三つ買いました。',
  ],
  'Korean': [
    '오늘은 날씨가 좋아서 공원에 산책하러 갑시다.',
    '그녀는 시장에서 빨간 사과 세 개를 샀다.',
  ],
  'Thai': [
    'วันนี้อากาศดีมากเราไปเดินเล่นที่สวนสาธารณะกันเถอะ',
    'เธอซื้อแอปเปิลแดงสามลูกที่ตลาด',
  ],
  'Lao': ['ມື້ນີ້ອາກາດດີຫຼາຍໄປຍ່າງຫຼິ້ນທີ່ສວນ', 'ນາງຊື້ໝາກແອັບເປິ້ນແດງສາມໜ່ວຍ'],
  'Khmer': [
    'ថ្ងៃនេះអាកាសធាតុល្អណាស់តោះទៅដើរលេងនៅសួនច្បារ',
    'នាងបានទិញផ្លែប៉ោមក្រហមបីនៅផ្សារ',
  ],
  'Burmese': [
    'ယနေ့ရာသီဥတုကောင်းမွန်သောကြောင့်ပန်းခြံသို့သွားကြပါစို့။',
    'သူမသည်ဈေးတွင်ပန်းသီးနီသုံးလုံးဝယ်ခဲ့သည်။',
  ],
  'Arabic': [
    'الطقس جميل اليوم فلنتمش إلى الحديقة.',
    'اشترت ثلاث تفاحات حمراء من السوق.',
  ],
  'Hebrew': [
    'מזג האוויר יפה היום, בואו נלך לפארק.',
    'היא קנתה שלושה תפוחים אדומים בשוק.',
  ],
  'Hindi': [
    'आज मौसम अच्छा है, चलो पार्क में टहलने चलते हैं।',
    'उसने बाज़ार से तीन लाल सेब खरीदे।',
  ],
  'Tamil': [
    'இன்று வானிலை நன்றாக உள்ளது, பூங்காவிற்கு நடந்து செல்வோம்.',
    'அவள் சந்தையில் மூன்று சிவப்பு ஆப்பிள்கள் வாங்கினாள்.',
  ],
  'Russian': [
    'Сегодня хорошая погода, пойдём гулять в парк.',
    'Она купила на рынке три красных яблока.',
  ],
  'Greek': [
    'Σήμερα ο καιρός είναι καλός, ας πάμε στο πάρκο.',
    'Αγόρασε τρία κόκκινα μήλα στην αγορά.',
  ],
  'Amharic': ['ዛሬ አየሩ ጥሩ ነው፣ ወደ መናፈሻ እንሂድ።', 'ከገበያ ሦስት ቀይ ፖም ገዛች።'],
  'Georgian': [
    'დღეს კარგი ამინდია, წავიდეთ პარკში სასეირნოდ.',
    'მან ბაზარში სამი წითელი ვაშლი იყიდა.',
  ],
  'Tibetan': ['དེ་རིང་གནམ་གཤིས་ཡག་པོ་འདུག', 'མོས་ཀུ་ཤུ་དམར་པོ་གསུམ་ཉོས་སོང་།'],
}
UNSPACED = ('Chinese', 'Japanese', 'Thai', 'Lao', 'Khmer', 'Burmese')
# Fetched from the network once, by who has one.
HERE = [
  metric for metric in metric_fns.METRICS.values() if metric.name != 'spbleu'
]
SHORT = ['yes', 'да', '是', 'ใช่', 'نعم', 'はい', '네', 'ναι', '3', '。', '?!']


def best(metric):
  """Returns the score of equal texts."""
  return 0 if metric.lower_is_better else 100


@pytest.mark.parametrize('metric', HERE, ids=lambda metric: metric.name)
@pytest.mark.parametrize('language', LANGUAGES)
def test_equal_texts_have_the_best_score_in_every_language(metric, language):
  for texts in (LANGUAGES[language], LANGUAGES[language][:1]):
    found = metric_fns.with_intervals(metric, num_samples=20)(texts, texts)
    assert list(found.values()) == pytest.approx([best(metric)] * len(found))


@pytest.mark.parametrize('metric', HERE, ids=lambda metric: metric.name)
@pytest.mark.parametrize('text', [*SHORT, '', ' ', 'a', 'The.'])
def test_equal_texts_of_a_word_or_of_none_have_the_best_score(metric, text):
  found = metric_fns.with_intervals(metric, num_samples=5)(
    [text] * 2, [text] * 2
  )
  assert list(found.values()) == pytest.approx([best(metric)] * len(found))


@pytest.mark.parametrize('metric', HERE, ids=lambda metric: metric.name)
def test_equal_texts_of_all_languages_at_once_score_well(metric):
  texts = [text for pair in LANGUAGES.values() for text in pair]
  for score in metric(texts, texts).values():
    assert abs(score - best(metric)) < 0.1
  # rouge_score gives 0 to an example without the n-gram that others have.
  for score in metric(SHORT, SHORT).values():
    assert abs(score - best(metric)) < 100


@pytest.mark.parametrize('metric', HERE, ids=lambda metric: metric.name)
@pytest.mark.parametrize('language', LANGUAGES)
def test_other_texts_score_worse(metric, language):
  texts = LANGUAGES[language]
  for score in metric(texts, texts[::-1]).values():
    assert abs(score - best(metric)) > 30


@pytest.mark.parametrize('language', UNSPACED)
def test_words_that_a_tokenizer_does_not_find_are_warned_of(language, capsys):
  texts = LANGUAGES[language]
  metric_fns.bleu(texts, texts)
  said = capsys.readouterr().err
  assert "'13a' finds no words" in said and 'scores.bleu_tokenizer' in said
  bleu.Bleu('bleu', 'char')(texts, texts)
  assert not capsys.readouterr().err
  metric_fns.ter(texts, texts)
  assert 'whole sentences are compared' in capsys.readouterr().err
  metric_fns.rouge(texts, texts)
  assert 'tok:words' in capsys.readouterr().err
  rouge.Rouge('rouge', 'latin')(texts, texts)
  assert 'letters are dropped' in capsys.readouterr().err
  for tokenizer in ('words', 'characters'):
    rouge.Rouge('rouge', tokenizer)(texts, texts)
  assert not capsys.readouterr().err


def test_text_with_spaces_is_not_warned_of(capsys):
  for language in ('English', 'Korean', 'Arabic', 'Hindi', 'Amharic'):
    metric_fns.bleu(LANGUAGES[language], LANGUAGES[language])
    metric_fns.token_f1(LANGUAGES[language], LANGUAGES[language])
    metric_fns.ter(LANGUAGES[language], LANGUAGES[language])
  metric_fns.rouge(LANGUAGES['English'], LANGUAGES['English'])
  assert not capsys.readouterr().err


def test_bleu_is_sacrebleus_with_every_tokenizer_that_is_here():
  targets, answers = zip(*LANGUAGES.values(), strict=True)
  pairs = zip(targets, answers, strict=True)
  answers = tuple(f'{target} {answer}' for target, answer in pairs)
  for tokenizer in ('13a', 'intl', 'zh', 'char', 'none'):
    metric = bleu.Bleu('bleu', tokenizer)
    expected = sacrebleu.corpus_bleu(answers, [targets], tokenize=tokenizer)
    assert metric(targets, answers) == {'bleu': expected.score}
    assert f'|eff:no|tok:{tokenizer}|' in metric.signature(targets)


def test_a_corpus_with_a_4_gram_scores_as_sacrebleu_has_it():
  # In both, though most are short; also where no answer has a 4-gram.
  targets = ['yes', 'no', 'a b c d e']
  for answers in (['yes', 'no', 'a b c d'], ['yes', 'no', 'a b c']):
    found = metric_fns.bleu(targets, answers)['bleu']
    assert found == sacrebleu.corpus_bleu(answers, [targets]).score
  assert found == 0
  assert '|eff:no|' in metric_fns.bleu.signature(targets)


def test_short_texts_are_told_by_the_signature_and_a_warning(capsys):
  # 2 of 3 words, of 1 bigram none, smoothed to a half.
  found = metric_fns.bleu(['yes sir', 'no'], ['yes madam', 'no'])['bleu']
  assert found == pytest.approx(100 * (2 / 3 * 1 / 2) ** (1 / 2))
  assert 'eff:yes in the signature' in capsys.readouterr().err
  assert '|eff:yes|' in metric_fns.bleu.signature(['yes sir', 'no'])
  assert metric_fns.rouge(['yes', 'no'], ['Yes!', 'yes'])['rouge2'] == 50
  assert '|eff:yes|' in metric_fns.rouge.signature(['yes', 'no'])
  assert '|eff:no|' in metric_fns.rouge.signature(['yes sir', 'no'])


def test_chrfpp_is_chrf_with_words():
  targets, answers = LANGUAGES['English'], LANGUAGES['English'][::-1]
  expected = sacrebleu.corpus_chrf(answers, [targets], word_order=2)
  assert metric_fns.chrfpp(targets, answers) == {'chrfpp': expected.score}
  assert '|nw:2|' in metric_fns.chrfpp.signature(targets)


def test_words_of_ascii_text_are_those_of_rouge_score():
  text = "Don't stop: the U.S. 3.5-fold rise_of GPT-4's runs, it's 10,000!"
  assert words.words(text) == rouge_tokenize.tokenize(text, None)
  targets, answers = LANGUAGES['English'], LANGUAGES['English'][::-1]
  answers[0] += ' The weathers walked.'
  for stemmer in (False, True):
    scorer = rouge_scorer.RougeScorer(['rouge1'], use_stemmer=stemmer)
    expected = [
      scorer.score(target, answer)['rouge1'].fmeasure
      for target, answer in zip(targets, answers, strict=True)
    ]
    for tokenizer in ('latin', 'words'):
      metric = rouge.Rouge('rouge', tokenizer, stemmer)
      found = metric(targets, answers)['rouge1']
      assert found == pytest.approx(100 * sum(expected) / 2)
      stems = 'yes' if stemmer else 'no'
      assert f'|tok:{tokenizer}|stem:{stems}|' in metric.signature(targets)


def test_words_of_scripts():
  assert words.words('Καλή, ΜΈΡΑ 3ης') == ['καλή', 'μέρα', '3ης']
  assert words.words('हिन्दी में') == ['हिन्दी', 'में']
  assert words.words('می‌خواهم.') == ['می‌خواهم']
  assert words.words('GPT4模型很好') == ['gpt4', '模', '型', '很', '好']
  assert words.words('ที่นี่') == ['ที่', 'นี่']
  assert words.characters('हिन्दी é!') == ['हि', 'न्', 'दी', 'é']


def test_rouge_of_characters_by_hand():
  # 3 of 4 characters, 2 of 3 pairs.
  found = rouge.Rouge('rouge', 'characters')(['今天很好'], ['今天很坏'])
  assert found['rouge1'] == pytest.approx(75)
  assert found['rouge2'] == pytest.approx(200 / 3)


@pytest.mark.parametrize('tokenizer', ['ja-mecab', 'ko-mecab', 'flores200'])
def test_a_tokenizer_that_is_not_here_is_named(
  tokenizer, monkeypatch, tmp_path
):
  for path in (
    'sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab',
    'sacrebleu.tokenizers.tokenizer_ko_mecab.mecab_ko',
    'sacrebleu.tokenizers.tokenizer_ko_mecab.MeCab',
  ):
    monkeypatch.setattr(path, None, raising=False)
  monkeypatch.setattr(
    'sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR', str(tmp_path)
  )
  for name in ('http_proxy', 'https_proxy'):  # So that no network is asked.
    monkeypatch.setenv(name, 'http://127.0.0.1:9')
  # The first `urlopen` of a process keeps its proxies for all later ones.
  monkeypatch.setattr('urllib.request._opener', None)
  with pytest.raises(ValueError) as error:
    scores.Scores(bleu_tokenizer=tokenizer).named(['bleu'], 'INFER_METRICS')
  text = str(error.value)
  assert f"scores.bleu_tokenizer='{tokenizer}' is not available" in text
  assert ('pip install' if 'mecab' in tokenizer else 'copy it to') in text
  assert '\n' not in text


@pytest.mark.parametrize(
  'settings, names, message',
  [
    ({'bleu_tokenizer': '14a'}, ['bleu'], r"bleu_tokenizer='14a': expected"),
    ({'rouge_stemmer': 'no'}, ['rouge'], r"rouge_stemmer='no': expected True"),
    ({'rouge_tokenizer': 'x'}, ['rouge'], r"rouge_tokenizer='x': expected"),
    ({}, ['comet'], r'expected a tuple.* of bleu, chrf.*scores\.functions'),
    (
      {'functions': {'comet': 3}},
      ['comet'],
      r'is 3; expected a function',
    ),
    (
      {'functions': {'bleu': len}},
      ['bleu'],
      r'has bleu, the name of an existing score',
    ),
    ({'functions': [len]}, ['bleu'], r'functions=.* expected a dict'),
  ],
)
def test_settings_that_are_none_are_refused(settings, names, message):
  with pytest.raises(ValueError, match=message):
    scores.Scores(**settings).named(names, 'INFER_METRICS')


def test_a_function_of_the_user_is_a_metric():
  def share(targets, predictions):
    return 100 * sum(map(str.__eq__, targets, predictions)) / len(targets)

  settings = scores.Scores(functions={'share': share, 'bad': lambda t, p: None})
  share_metric, bad = settings.named(('share', 'bad'), 'INFER_METRICS')
  assert share_metric(['a', 'b'], ['a', 'c']) == {'share': 50}
  assert metric_fns.with_intervals(share_metric) is share_metric
  with pytest.raises(ValueError, match=r"\['bad'\] returned a NoneType"):
    bad(['a'], ['a'])


@pytest.fixture
def bound(vocabulary_of_helpers):
  yield lambda name: tasks.bind(
    name, vocabulary_of_helpers, vocabulary_of_helpers
  )
  gin.clear_config()


@pytest.fixture(scope='module')
def vocabulary_of_helpers():
  import helpers

  return helpers.vocabulary()


def test_gin_chooses_by_task(bound, tmp_path):
  path = tmp_path / 'test.jsonl'
  path.write_text('{"source": "a", "target": "b"}\n')
  gin_config.parse_config(
    ['gin_configs/tasks/seqio.gin'],
    [
      'scores.bleu_tokenizer=intl',
      'scores.functions={"length": @l2s_jax.test_length}',
      'wmt16_en_ro/scores.metrics=("chrfpp", "bleu", "length")',
      'news/scores.rouge_tokenizer=characters',
      'news/scores.rouge_stemmer=False',
      f'local_task.data_files={{"test": "{path}"}}',
      'local_task.metrics=("rouge", "bleu")',
    ],
  )
  german = bound('wmt16_en_de').metric_fns
  assert german[0] == bleu.Bleu('bleu', 'intl')
  romanian = bound('wmt16_en_ro').metric_fns
  assert romanian[:2] == [metric_fns.chrfpp, bleu.Bleu('bleu', 'intl')]
  assert romanian[2](['a'], ['b']) == {'length': 1}
  news, plain = (bound(name).metric_fns for name in ('news/local', 'local'))
  assert news[0] == rouge.Rouge('rouge', 'characters', stemmer=False)
  assert plain == [metric_fns.rouge, bleu.Bleu('bleu', 'intl')]
  gin.clear_config()
  assert bound('wmt19_en_zh').metric_fns[0] == bleu.Bleu('bleu', 'zh')


@gin.register('test_length', module='l2s_jax')
def length_of_users(targets, predictions):
  return len(predictions)
