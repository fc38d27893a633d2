"""How much a caption reads like those that people wrote: BLEU and CIDEr-D.

Papineni et al., "BLEU" (ACL 2002) over a corpus, and Vedantam et al., "CIDEr"
(arXiv 1411.5726), in its variant D, as COCO's evaluation computes them; they go
with the captioning half of METHOD section 4. Both count n-grams and know
nothing of synonyms or pictures. Plain Python.

The tokenizer is PTB-like, as COCO's: lower case, no punctuation, clitics alone
("don't" is "do n't", "dog's" is "dog 's"), hyphenated words and numbers whole.
It is not the Stanford tokenizer itself, which differs on rare forms
("gonna", abbreviations).
"""

from collections import Counter
from collections.abc import Sequence
import math
import re

from unicode_jax import config as config_lib

MAX_ORDER = 4
# Of CIDEr-D's penalty on a difference of lengths, words.
_SIGMA = 6.0
_TOKEN = re.compile(
  r"""
  \d+(?:[.,:]\d+)+               # 3.5, 1,000, 10:30
  | [^\W_]+?(?=n't\b)             # do, of don't
  | n't\b
  | '(?:s|m|d|re|ve|ll)\b         # the 's of dog's
  | [^\W_]+(?:-[^\W_]+)*          # dog, t-shirt, 3rd
  """,
  re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
  """Splits a caption into words, see the module.

  Args:
    caption: any text.

  Returns:
    Words in lower case, without punctuation.
  """
  return _TOKEN.findall(
    caption.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
  )


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
  """Counts the n-grams of every order at once."""
  return Counter(
    tuple(words[start : start + order])
    for order in range(1, MAX_ORDER + 1)
    for start in range(len(words) - order + 1)
  )


def _tokenized(
  captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
  """Tokenizes all, or says what is wrong with them."""
  if not captions or len(captions) != len(references):
    raise config_lib.ConfigError(
      f"{len(captions)} captions and {len(references)} lists of references: "
      "want one of each per picture, and at least one picture"
    )
  for i, texts in enumerate(references):
    if not texts or isinstance(texts, str):
      raise config_lib.ConfigError(
        f"references of picture {i} are {texts!r}: want a sequence of one or "
        "more captions"
      )
  return (
    [tokenize(caption) for caption in captions],
    [[tokenize(text) for text in texts] for texts in references],
  )


def bleu(
  captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float, float, float]:
  """Returns BLEU-1 to BLEU-4 of a corpus, in [0, 1].

  BLEU-n is the geometric mean of the clipped precisions of orders 1 to n, times
  exp(1 - r / c) where the captions are shorter in all (c words) than the
  references closest in length (r words; the shorter one of two as close).
  Nothing is smoothed: an order without a match makes 0.

  Args:
    captions: one per picture.
    references: one or more per picture.

  Raises:
    ConfigError: the lengths differ, or something is missing.
  """
  hits, totals = [0] * MAX_ORDER, [0] * MAX_ORDER
  length = closest = 0
  for words, texts in zip(*_tokenized(captions, references), strict=True):
    length += len(words)
    closest += min((abs(len(text) - len(words)), len(text)) for text in texts)[
      1
    ]
    allowed = Counter()
    for text in texts:
      allowed |= _ngrams(text)
    for ngram, count in _ngrams(words).items():
      totals[len(ngram) - 1] += count
      hits[len(ngram) - 1] += min(count, allowed[ngram])
  if not length:
    return (0.0,) * MAX_ORDER
  penalty = math.exp(min(0.0, 1 - closest / length))
  scores, log_precision = [], 0.0
  for order, (hit, total) in enumerate(zip(hits, totals, strict=True), 1):
    log_precision += math.log(hit / total) if hit else -math.inf
    scores.append(penalty * math.exp(log_precision / order))
  return tuple(scores)


def cider(
  captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
  """Returns CIDEr-D, 0 to 10, over a corpus and of each caption.

  An n-gram weighs the logarithm of pictures over pictures that have it in a
  reference. So the score depends on the whole corpus: it is 0 for one picture,
  and small corpora compare with nothing else.

  Args:
    captions: one per picture.
    references: one or more per picture.

  Returns:
    The mean, and one score per picture.

  Raises:
    ConfigError: the lengths differ, or something is missing.
  """
  predicted, written = _tokenized(captions, references)
  counts = [[_ngrams(text) for text in texts] for texts in written]
  pictures_with = Counter(
    ngram for texts in counts for ngram in set().union(*texts)
  )

  def weigh(ngrams):
    """Returns tf-idf vectors of the orders."""
    vectors = [{} for _ in range(MAX_ORDER)]
    for ngram, count in ngrams.items():
      rarity = math.log(len(counts) / max(1, pictures_with[ngram]))
      vectors[len(ngram) - 1][ngram] = count * rarity
    return vectors

  scores = []
  for words, texts, ngrams in zip(predicted, written, counts, strict=True):
    vectors = weigh(_ngrams(words))
    total = 0.0
    for text, text_ngrams in zip(texts, ngrams, strict=True):
      similarity = sum(map(_clipped_cosine, vectors, weigh(text_ngrams)))
      difference = len(words) - len(text)
      total += similarity * math.exp(-(difference**2) / (2 * _SIGMA**2))
    scores.append(10 * total / (MAX_ORDER * len(texts)))
  return sum(scores) / len(scores), scores


def _clipped_cosine(
  caption: dict[tuple[str, ...], float], text: dict[tuple[str, ...], float]
) -> float:
  """Cosine, where a caption gains nothing by repeating words."""
  norms = math.sqrt(
    sum(v * v for v in caption.values()) * sum(v * v for v in text.values())
  )
  if not norms:
    return 0.0
  shared = caption.keys() & text.keys()
  return sum(min(caption[n], text[n]) * text[n] for n in shared) / norms
