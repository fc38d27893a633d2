r"""LLaVA's JSON with its images: the data of METHOD section 4.

The format of LCS-558K's blip_laion_cc_sbu_558k.json and Mixed-665K's
llava_v1_5_mix665k.json, as one JSON list or one record a line:

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [
       {"from": "human", "value": "<image>\nWhat colour is the bus?"},
       {"from": "gpt", "value": "White and red."},
       {"from": "human", "value": "Which way does it go?"},
       {"from": "gpt", "value": "To the left."}]}

A record without "image" is text only. The placeholder is taken out wherever it
stands: the model reads the image before the first question. Where nothing but
the placeholder is asked, the answer is a caption. Held out by image path, hence
with all its records, and text by record id. Records with a mistake and images
that cannot be read are counted, named in the log and skipped up to a limit.
Several images in one record are not supported; nothing here tokenises.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import logging
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from unicode_jax import config as config_lib
from unicode_jax.data import cache, text_files
from unicode_jax.data.sequences import Conversation
from unicode_jax.data.sources.folder import image_folder, read_captions
from unicode_jax.data.sources.images import decode_image, file_stamp
from unicode_jax.data.sources.source import (
  Annotation,
  ImageSource,
  check_split,
  is_heldout,
  max_skipped,
  partition,
  split,
)

PLACEHOLDER = "<image>"

Turns = tuple[tuple[str, str], ...]


class _RecordError(ValueError):
  """What is wrong with one record, and what is wanted."""


@dataclasses.dataclass(frozen=True)
class _Record:
  """One record, checked.

  Attributes:
    key: decides whether a text-only record is held out.
    image: normalised path below the folder; None for text only.
    turns: (question, answer) pairs, at least one.
    opened_by_model: its first turn was nobody's answer, and was dropped.
    unanswered: its last question had no answer, and was dropped.
  """

  key: str
  image: str | None
  turns: Turns
  opened_by_model: bool
  unanswered: bool


def load_llava(
  path: str | os.PathLike[str],
  conversations: str | os.PathLike[str],
  image_size: int,
  *,
  captions: str | os.PathLike[str] | None = None,
  heldout_fraction: float = 0.1,
  text_heldout_fraction: float = 0.1,
  cache_dir: str | os.PathLike[str] | None = None,
  max_broken: float = 0.1,
) -> tuple[
  tuple[ImageSource, ImageSource],
  tuple[list[Conversation], list[Conversation]],
]:
  """Loads conversations about images, and text-only ones, from LLaVA's JSON.

  Args:
    path: folder that the image paths start from.
    conversations: the JSON or JSON lines file.
    image_size: S, pixels; see `decode_image`.
    captions: JSONL of captions of the same images; see `load_folder`.
    heldout_fraction: share of the images that is held out, by path.
    text_heldout_fraction: share of the text-only records, by id.
    cache_dir: see `cache.cached_images`.
    max_broken: share of the records, and of the images, that may be broken;
      see `max_skipped`.

  Returns:
    Training and held-out images; training and held-out text-only conversations,
    either of which may be empty.

  Raises:
    ConfigError: no such folder or file, no JSON, no image, or too many broken
      records or images.
  """
  folder = image_folder(path)
  file = Path(os.path.expanduser(conversations))
  if not file.is_file():
    raise config_lib.ConfigError(
      f"config.data.conversations={str(conversations)!r} is not a file"
    )
  records = _read_records(file, max_broken)
  by_image = collections.defaultdict(list)
  for record in records:
    if record.image is not None:
      by_image[record.image].append(record.turns)
  if not by_image:
    raise config_lib.ConfigError(
      f"no record of {file} names an image: a visual tokenizer needs some; "
      'want {"image": "relative/path.jpg", "conversations": [...]}'
    )
  texts = read_captions(captions, by_image)
  contents = [
    {"name": name, "stamp": file_stamp(folder / name)}
    for name in sorted(by_image)
  ]
  cached = cache.cached_images(
    "llava",
    contents,
    lambda content: decode_image(folder / content["name"], image_size),
    image_size,
    version=str(folder.resolve()),
    cache_dir=cache_dir,
    max_broken=max_skipped(max_broken, len(contents)),
  )
  if cached.broken:
    logging.warning(
      "%s: skipped %d records with the %d images that could not be read",
      file,
      sum(len(by_image[name]) for name, _ in cached.broken),
      len(cached.broken),
    )
  sources = split(
    "llava",
    cached,
    lambda item: is_heldout(item["name"], heldout_fraction),
    {
      item["name"]: _annotation(
        by_image[item["name"]], texts.get(item["name"], ())
      )
      for item in cached.items
    },
  )
  check_split(
    sources, f"{len(cached.items)} images that {file} names", heldout_fraction
  )
  return sources, _split_texts(records, text_heldout_fraction)


def _annotation(said: Sequence[Turns], captions: Sequence[str]) -> Annotation:
  """Gathers all records of one image; an answer to no question is a caption."""
  described = [turns[0][1] for turns in said if not turns[0][0]]
  return Annotation(
    captions=(*described, *captions),
    dialogues=tuple(turns for turns in said if turns[0][0]),
  )


def _split_texts(
  records: Sequence[_Record], heldout_fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
  """Splits the text-only records; what is held out is nowhere trained on."""
  train, heldout = (
    [Conversation(record.turns) for record in side]
    for side in partition(
      [record for record in records if record.image is None],
      lambda record: is_heldout(record.key, heldout_fraction),
    )
  )
  known = set(heldout)
  return [c for c in train if c not in known], heldout


def _read_records(file: Path, max_broken: float) -> list[_Record]:
  """Reads the good records, reports the others; ConfigError for too many."""
  records, problems, total = [], [], 0
  for where, record in _raw_records(file):
    total += 1
    try:
      if isinstance(record, _RecordError):
        raise record
      records.append(_check_record(record))
    except _RecordError as error:
      name = f" (id {_shorten(record['id'])})" if _has_id(record) else ""
      problems.append(text_files.printable(f"{where}{name}: {error}"))
  allowed = max_skipped(max_broken, total)
  shown = "\n  ".join(problems[:10])
  if len(problems) > allowed:
    raise config_lib.ConfigError(
      f"{len(problems)} of {total} records of {file} cannot be used, more than "
      f"the {allowed} that are skipped; correct them, or raise "
      f"config.data.max_broken:\n  {shown}"
    )
  if not records:
    raise config_lib.ConfigError(
      f"{file} holds no record that can be used; want a JSON list, or lines, "
      'of {"id": ..., "image": "relative/path.jpg", "conversations": [...]}'
      + (f":\n  {shown}" if problems else "")
    )
  if problems:
    logging.warning(
      "%s: skipped %d of %d records that cannot be used: %s%s",
      file,
      len(problems),
      total,
      "; ".join(problems[:10]),
      "; ..." if len(problems) > 10 else "",
    )
  logging.info(
    "%s: %d conversations on images and %d text-only ones; dropped the first "
    "turn of %d that the model opens, and the last of %d that it does not "
    "answer",
    file,
    sum(record.image is not None for record in records),
    sum(record.image is None for record in records),
    sum(record.opened_by_model for record in records),
    sum(record.unanswered for record in records),
  )
  return records


def _raw_records(file: Path) -> Iterator[tuple[str, Any]]:
  """Yields where each record stands, and its JSON or what is wrong with it."""
  text = text_files.read_utf8(file)
  if text.lstrip().startswith("["):
    try:
      records = config_lib.parse_json(text)
    except ValueError as error:
      raise config_lib.ConfigError(
        f"{file} is not JSON: {error}; want one list of records, or one record "
        "a line"
      ) from error
    for number, record in enumerate(records, 1):
      yield f"record {number}", record
    return
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      record = config_lib.parse_json(line)
    except ValueError as error:
      record = _RecordError(f"is not JSON ({error}): {_shorten(line)}")
    yield f"line {number}", record


def _has_id(record: Any) -> bool:
  """Says whether a record has an id that can be hashed."""
  id_ = record.get("id") if isinstance(record, dict) else None
  return isinstance(id_, int) or (isinstance(id_, str) and _is_text(id_))


def _check_record(record: Any) -> _Record:
  """Returns a record, or raises _RecordError."""
  if not isinstance(record, dict):
    raise _RecordError(
      'want {"id": ..., "image": "relative/path.jpg", "conversations": [...]}, '
      f"got {_shorten(record)}"
    )
  image = _check_image(record.get("image"))
  lines = _check_lines(record.get("conversations"))
  opened_by_model, unanswered = False, False
  while lines and lines[0][0] == "gpt":
    lines, opened_by_model = lines[1:], True
  for place, (who, _) in enumerate(lines):
    if who != ("human", "gpt")[place % 2]:
      raise _RecordError(
        f'two turns of {who!r} in a row: want "human" and "gpt" in turn'
      )
  if len(lines) % 2:
    lines, unanswered = lines[:-1], True
  if not lines:
    raise _RecordError(
      'has no question with an answer: want a turn of "human", then one of '
      '"gpt"'
    )
  questions = [text for _, text in lines[::2]]
  answers = [text.strip() for _, text in lines[1::2]]
  if image is not None:
    questions = _without_placeholder(questions)
  elif (asked := questions[0].strip()).startswith(
    PLACEHOLDER
  ) or asked.endswith(PLACEHOLDER):
    # Amid a text it may be just that, text; at its ends it stands for an image.
    raise _RecordError(
      f"has the placeholder {PLACEHOLDER} but no image: want "
      '"image": "relative/path.jpg"'
    )
  questions = [text.strip() for text in questions]
  described = image is not None and len(answers) == 1
  for place, (question, answer) in enumerate(zip(questions, answers), 1):
    if not answer or not (question or described):
      what = "answer" if question else "question"
      raise _RecordError(f"{what} {place} is empty: want text")
  key = str(record["id"]) if _has_id(record) else questions[0]
  return _Record(
    key,
    image,
    tuple(zip(questions, answers)),
    opened_by_model,
    unanswered,
  )


def _check_image(image: Any) -> str | None:
  """Returns the normalised path of an image below the folder."""
  if image is None:
    return None
  if not isinstance(image, str) or not _is_text(image) or not image:
    raise _RecordError(
      f'"image" must be one path as text, got {_shorten(image)}'
    )
  path = PurePosixPath(image)
  if (
    path.is_absolute()
    or PureWindowsPath(image).anchor
    or ".." in PureWindowsPath(image).parts  # Splits at both kinds of slash.
  ):
    raise _RecordError(
      f"image {image!r} leads out of the folder: want a path relative to "
      'config.data.path, without ".."'
    )
  return path.as_posix()


def _check_lines(conversations: Any) -> list[tuple[str, str]]:
  """Returns (who, text) of each turn."""
  if not isinstance(conversations, list) or not conversations:
    raise _RecordError(
      '"conversations" must be a list of {"from": "human" or "gpt", "value": '
      f"text}}, got {_shorten(conversations)}"
    )
  lines = []
  for place, line in enumerate(conversations, 1):
    match line:
      case {"from": "human" | "gpt" as who, "value": str(text)} if _is_text(
        text
      ):
        if len(text.encode()) > text_files.MAX_TEXT_BYTES:
          raise _RecordError(
            f"turn {place} has more than {text_files.MAX_TEXT_BYTES} bytes"
          )
        lines.append((who, text))
      case _:
        raise _RecordError(
          f'turn {place} must be {{"from": "human" or "gpt", "value": text}}, '
          f"got {_shorten(line)}"
        )
  return lines


def _without_placeholder(questions: Sequence[str]) -> list[str]:
  """Takes the one placeholder out of a conversation on an image."""
  count = sum(text.count(PLACEHOLDER) for text in questions)
  if count > 1:
    raise _RecordError(
      f"has {count} placeholders {PLACEHOLDER}: a conversation is about one "
      "image"
    )
  return [_without_one(text) for text in questions]


def _without_one(text: str) -> str:
  """Takes a placeholder out, with the line breaks and spaces around it."""
  before, found, after = text.partition(PLACEHOLDER)
  if not found:
    return text
  start, stop = before.rstrip(), after.lstrip()
  gap = before[len(start) :] + after[: len(after) - len(stop)]
  return start + ("\n" if "\n" in gap else " ") + stop


def _is_text(text: str) -> bool:
  """Says whether a string is Unicode: JSON can spell half a surrogate pair."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _shorten(value: Any) -> str:
  """Returns a value for an error message, on one line."""
  try:
    text = repr(value[:120] if isinstance(value, str) else value)
  except RecursionError:
    return "what is nested too deeply"
  return text if len(text) <= 120 else f"{text[:117]}..."
