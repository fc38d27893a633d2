"""LLaVA's JSON: what is read, what is refused, and what never leaks."""

import json
import logging

import numpy as np
from PIL import Image
import pytest

from unicode_jax.data import sources
from unicode_jax.data.sequences import Conversation


def human(value):
  return {"from": "human", "value": value}


def gpt(value):
  return {"from": "gpt", "value": value}


def record(image, *lines, **fields):
  about = {} if image is None else {"image": image}
  return {"id": f"id of {image}", **about, "conversations": [*lines], **fields}


def plain(number):
  return record(
    f"some/{number}.png", human("<image>\nWhat?"), gpt(f"Number {number}.")
  )


@pytest.fixture
def folder(tmp_path):
  """Forty images in a folder below; number i is of red i."""
  root = tmp_path / "images"
  (root / "some").mkdir(parents=True)
  for i in range(40):
    Image.new("RGB", (8 + i, 6), (i, 0, 0)).save(root / "some" / f"{i}.png")
  return root


def load(folder, records, *, lines=False, **kwargs):
  file = folder.parent / "conversations.json"
  if isinstance(records, str):
    text = records
  elif lines:
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
  else:
    text = json.dumps(records)
  file.write_text(text, encoding="utf-8")
  kwargs = {"cache_dir": folder.parent / "cache", **kwargs}
  return sources.load_llava(folder, file, 4, **kwargs)


def annotations(pair):
  """Annotations of both sides by the image's number."""
  return {
    int(item["name"].split("/")[-1][:-4]): annotation
    for source in pair
    for item, annotation in zip(source.items, source.annotations, strict=True)
  }


BASE = [plain(i) for i in range(40)]


@pytest.mark.parametrize("lines", [False, True])
def test_images_meet_their_own_conversations(folder, lines):
  more = [
    record("some/3.png", human("Again?\n<image>"), gpt("Yes."), id=7),
    record(
      "some/5.png",
      human("<image>\nA?\nor B?"),
      gpt(" first "),
      human("And?"),
      gpt("second\u2028line"),
    ),
  ]
  (train, heldout), texts = load(folder, [*BASE, *more], lines=lines)
  assert (train.name, heldout.name) == ("llava_train", "llava_heldout")
  names = [{item["name"] for item in s.items} for s in (train, heldout)]
  assert len(names[0]) + len(names[1]) == 40 and not names[0] & names[1]
  assert names[1] == {
    f"some/{i}.png"
    for i in range(40)
    if sources.is_heldout(f"some/{i}.png", 0.1)
  }
  for source in (train, heldout):
    for item, image, said in zip(
      source.items, source.images(), source.annotations, strict=True
    ):
      number = int(item["name"].split("/")[-1][:-4])
      assert (image == (number, 0, 0)).all()
      assert said.dialogues[0] == (("What?", f"Number {number}."),)
      assert said.captions == () and said.label is None
  said = annotations((train, heldout))
  assert said[3].dialogues == (
    (("What?", "Number 3."),),
    (("Again?", "Yes."),),
  )
  assert said[5].dialogues[1] == (
    ("A?\nor B?", "first"),
    ("And?", "second\u2028line"),
  )
  assert texts == ([], [])


@pytest.mark.parametrize(
  ("asked", "question"),
  [
    ("<image>\nWhat?", "What?"),
    ("What?\n<image>", "What?"),
    ("<image>What?", "What?"),
    ("What is <image> ?", "What is ?"),
    ("See\n<image>\nWhat?", "See\nWhat?"),
    ("What?", "What?"),
  ],
)
def test_the_placeholder_goes(folder, asked, question):
  records = [*BASE[1:], record("some/0.png", human(asked), gpt("It."))]
  pair, _ = load(folder, records)
  assert annotations(pair)[0].dialogues == (((question, "It."),),)


def test_the_placeholder_may_come_late(folder):
  late = record(
    "some/0.png", human("Hi"), gpt("Hi!"), human("<image>\nThis?"), gpt("Red.")
  )
  pair, _ = load(folder, [*BASE[1:], late])
  assert annotations(pair)[0].dialogues == ((("Hi", "Hi!"), ("This?", "Red.")),)


def test_an_answer_to_the_image_alone_is_a_caption(folder):
  captions = folder.parent / "captions.jsonl"
  captions.write_text(json.dumps({"image": "some/0.png", "text": "nought"}))
  records = [*BASE, record("some/0.png", human("<image>"), gpt("a red image"))]
  pair, _ = load(folder, records, captions=captions)
  said = annotations(pair)
  assert said[0].captions == ("a red image", "nought")
  assert said[0].dialogues == ((("What?", "Number 0."),),)
  assert said[1].captions == ()


def test_text_only_records_are_split_by_id(folder):
  texts = [
    record(None, human(f"q{i}"), gpt(f"a{i}"), id=f"text {i}")
    for i in range(200)
  ]
  # The same conversation under two ids, one on each side.
  ids = {sources.is_heldout(f"copy {i}", 0.1): f"copy {i}" for i in range(99)}
  texts += [record(None, human("q"), gpt("a"), id=i) for i in ids.values()]
  # Without an id its question decides.
  texts.append({"conversations": [human("no id <image> here"), gpt("ok")]})
  _, (train, heldout) = load(folder, [*BASE, *texts])
  assert {c.turns[0][0] for c in heldout} == {
    *(f"q{i}" for i in range(200) if sources.is_heldout(f"text {i}", 0.1)),
    "q",
  }
  assert len(train) + len(heldout) == 202 and not set(train) & set(heldout)
  assert Conversation((("no id <image> here", "ok"),)) in train
  _, (train, heldout) = load(folder, [*BASE, *texts], text_heldout_fraction=1.0)
  assert not train and len(heldout) == 203


def test_loose_ends_are_dropped_and_counted(folder, caplog):
  records = [
    record("some/0.png", gpt("Hello!"), human("<image>\nQ"), gpt("A")),
    record("some/1.png", human("<image>\nQ"), gpt("A"), human("And?")),
    *BASE[2:],
  ]
  with caplog.at_level(logging.INFO):
    pair, _ = load(folder, records)
  said = annotations(pair)
  assert said[0].dialogues == said[1].dialogues == ((("Q", "A"),),)
  assert "40 conversations on images and 0 text-only" in caplog.text
  assert "first turn of 1 that the model opens, and the last of 1" in (
    caplog.text
  )


GOOD = (human("<image>\nQ"), gpt("A"))
UNASKED = (human(" "), gpt("A"))


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ("a text", r"record 41: want \{.id"),
    ({"id": 5, "image": "some/0.png"}, r"record 41 \(id 5\): .conversations."),
    (record("some/0.png"), r"\(id 'id of some/0.png'\): .conversations."),
    (record("some/0.png", "hi"), "turn 1 must be .*got 'hi'"),
    (record("some/0.png", {"from": "user", "value": "?"}), "turn 1 must be"),
    (record("some/0.png", GOOD[0], {"from": "gpt"}), "turn 2 must be"),
    (record("some/0.png", GOOD[0], gpt(3)), "turn 2 must be"),
    (record("some/0.png", GOOD[0], gpt("\ud800")), "turn 2 must be"),
    (record("some/0.png", *GOOD, *GOOD[1:]), "two turns of 'gpt' in a row"),
    (record("some/0.png", GOOD[0], *GOOD), "two turns of 'human' in a row"),
    (record("some/0.png", GOOD[0]), "no question with an answer"),
    (record("some/0.png", GOOD[1]), "no question with an answer"),
    (record("some/0.png", GOOD[0], gpt(" ")), "answer 1 is empty"),
    (record("some/0.png", *GOOD, human(""), gpt("A")), "question 2 is empty"),
    (record("some/0.png", *UNASKED, *GOOD), "question 1 is empty"),
    (record("some/0.png", human("<image><image>"), gpt("A")), "2 placeholders"),
    (record(["a.png", "b.png"], *GOOD), "must be one path as text"),
    (record(7, *GOOD), "must be one path as text"),
    (record("", *GOOD), "must be one path as text"),
    (record("../some/0.png", *GOOD), "leads out of the folder"),
    (record("some/../../0.png", *GOOD), "leads out of the folder"),
    (record("..\\0.png", *GOOD), "leads out of the folder"),
    (record("/some/0.png", *GOOD), "leads out of the folder"),
    (record("C:\\some\\0.png", *GOOD), "leads out of the folder"),
    (record(None, human("<image>\nQ"), gpt("A")), "placeholder.*no image"),
  ],
)
def test_a_bad_record_is_named_and_skipped(folder, caplog, bad, message):
  with caplog.at_level(logging.WARNING):
    pair, texts = load(folder, [*BASE, bad])
  assert "skipped 1 of 41 records" in caplog.text
  caplog.clear()
  assert sum(len(a.dialogues) for a in annotations(pair).values()) == 40
  assert texts == ([], [])
  with pytest.raises(
    ValueError, match=rf"(?s)11 of 51 .*max_broken.*{message}"
  ):
    load(folder, [*BASE, *[bad] * 11])
  load(folder, [*BASE, *[bad] * 11], max_broken=0.25)  # 12 of 51.


def test_bad_lines_are_named_by_their_number(folder, caplog):
  text = "\n".join([json.dumps(r) for r in BASE[:20]] + ["", '{"id": 3,'])
  text += "\n" + "\n".join(json.dumps(r) for r in BASE[20:])
  with caplog.at_level(logging.WARNING):
    pair, _ = load(folder, text)
  assert "line 22: is not JSON" in caplog.text
  assert len(annotations(pair)) == 40


def test_paths_are_compared_as_paths(folder):
  records = [record("./some//0.png", *GOOD), *BASE]
  pair, _ = load(folder, records)
  assert len(annotations(pair)) == 40
  assert len(annotations(pair)[0].dialogues) == 2


def test_images_that_cannot_be_read(folder, caplog):
  (folder / "some" / "5.png").write_text("no image")
  (folder / "some" / "6.png").unlink()
  (folder / "some" / "7.png").unlink()
  (folder / "some" / "7.png").mkdir()
  records = [*BASE, plain(6), record("some/\0.png", *GOOD)]
  with caplog.at_level(logging.WARNING):
    pair, _ = load(folder, records)
  assert set(annotations(pair)) == set(range(40)) - {5, 6, 7}
  for number in (5, 6, 7):
    assert f"some/{number}.png: " in caplog.text
  assert "skipped 4 of 41 images" in caplog.text
  assert "skipped 5 records with the 4 images" in caplog.text
  # An image that has come meanwhile is read.
  Image.new("RGB", (5, 5), (6, 0, 0)).save(folder / "some" / "6.png")
  pair, _ = load(folder, records)
  assert set(annotations(pair)) == set(range(40)) - {5, 7}


def test_too_many_missing_images(folder):
  records = BASE + [plain(i) for i in range(100, 111)]
  with pytest.raises(
    ValueError, match=r"(?s)more than the 10.*some/100.png: FileNotFoundError"
  ):
    load(folder, records)
  pair, _ = load(folder, records, max_broken=0.22)  # 11 of 51.
  assert len(annotations(pair)) == 40


def test_copies_of_heldout_images_are_not_trained_on(folder):
  (_, heldout), _ = load(folder, BASE)
  original = folder / heldout.items[0]["name"]
  for i in range(100, 120):
    (folder / "some" / f"{i}.png").write_bytes(original.read_bytes())
  (train, _), _ = load(folder, BASE + [plain(i) for i in range(100, 120)])
  said = [d for a in train.annotations for d in a.dialogues]
  assert len(said) == len(train)
  assert not any(
    turn[1] == f"Number {i}." for i in range(100, 120) for (turn,) in said
  )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('[{"id": 1},', "is not JSON: .*want one list of records"),
    ("", "holds no record that can be used"),
    ("[]", "holds no record that can be used"),
    (
      '{"data": [1]}',
      r"(?s)no record that can be used.*line 1: .conversations",
    ),
    (
      json.dumps([record(None, human("q"), gpt("a"))]),
      "no record of .* names an image",
    ),
    (json.dumps([plain(0)]), "too few to hold out"),
  ],
)
def test_files_that_are_of_no_use(folder, text, message):
  with pytest.raises(ValueError, match=message):
    load(folder, text)


def test_missing_files(folder):
  with pytest.raises(ValueError, match=r"conversations='.*none' is not a file"):
    sources.load_llava(folder, folder / "none", 4)
  with pytest.raises(ValueError, match=r"path='.*none' is not a folder"):
    sources.load_llava(folder / "none", folder / "none", 4)


def test_pixels_come_from_the_named_file(folder):
  """Rows of the cache and records are matched by name, not by position."""
  records = [plain(i) for i in reversed(range(40))]
  pair, _ = load(folder, records)
  for source in pair:
    reds = source.images()[:, 0, 0, 0]
    answers = [a.dialogues[0][0][1] for a in source.annotations]
    np.testing.assert_array_equal(
      reds, [int(a.split()[1].rstrip(".")) for a in answers]
    )
