"""Sources: real pictures, folders of anything, and splits that do not leak."""

import hashlib
import io
import json
import logging
import os
import sys

from hypothesis import HealthCheck, given, settings, strategies as st
import numpy as np
from PIL import Image
import pytest

from unicode_jax.data import sources


def pixels_of(source):
  return {hashlib.sha256(image.tobytes()).digest() for image in source.images()}


def test_split_never_moves():
  """Fixed answers: a change of the hash would leak old held-out items."""
  held = [n for n in map(str, range(40)) if sources.is_heldout(n, 0.1)]
  assert held == ["9", "39"]
  assert not sources.is_heldout("x", 0.0) and sources.is_heldout("x", 1.0)
  share = np.mean([sources.is_heldout(f"n{i}", 0.1) for i in range(5000)])
  assert abs(share - 0.1) < 0.015


def test_openmoji_is_split_by_name(openmoji):
  train, heldout = openmoji
  bases = [
    {sources.untoned_name(item["name"]) for item in split.items}
    for split in openmoji
  ]
  assert not bases[0] & bases[1]
  assert not pixels_of(train) & pixels_of(heldout)
  total = len(train) + len(heldout)
  assert 3900 < total <= 3953
  assert 0.05 < len(heldout) / total < 0.15
  assert 0.08 < len(bases[1]) / len(bases[0] | bases[1]) < 0.12
  assert sources.Annotation(captions=("rooster",)) in (
    train.annotations + heldout.annotations
  )
  tones = [i["name"] for i in heldout.items if "skin tone" in i["name"]]
  assert len(tones) > 20


@pytest.mark.parametrize(
  ("name", "base"),
  [
    ("rooster", "rooster"),
    ("woman technologist medium-dark skin tone", "woman technologist"),
    ("handshake light skin tone medium skin tone", "handshake"),
    ("kiss person person dark skin tone light skin tone", "kiss"),
    ("woman light skin tone red hair", "woman red hair"),
    ("medium skin tone", ""),
    ("person in lotus position", "person in lotus position"),
    ("light bulb", "light bulb"),
  ],
)
def test_untoned_name(name, base):
  assert sources.untoned_name(name) == base


def test_openmoji_is_drawn_on_white(openmoji):
  images = openmoji[0].images().astype(int)
  corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
  assert np.median(corners) == 255
  # Rendered, not blank: nearly all have colours or black lines.
  assert (images.reshape(len(images), -1).std(1) > 10).mean() > 0.98
  assert openmoji[0][5]["image"].shape == (16, 16, 3)


def test_easy_vqa_test_split_is_never_trained_on(easy_vqa):
  import easy_vqa as package

  train, test = easy_vqa
  assert (len(train), len(test)) == (4000, 1000)
  assert not pixels_of(train) & pixels_of(test)
  for split, paths in (
    (train, package.get_train_image_paths()),
    (test, package.get_test_image_paths()),
  ):
    for index in (0, 17, len(split) - 1):
      with Image.open(paths[int(split.items[index]["name"])]) as image:
        expected = np.asarray(
          image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
        )
      np.testing.assert_array_equal(split[index]["image"], expected)


def test_easy_vqa_questions(easy_vqa):
  for split, source, count in zip(
    ("train", "test"), easy_vqa, (38575, 9673), strict=True
  ):
    questions = sources.easy_vqa_questions(split)
    assert len(questions) == count
    names = {item["name"] for item in source.items}
    assert {name for _, _, name in questions} <= names
  assert ("what is the blue shape?", "rectangle", "0") in (
    sources.easy_vqa_questions("train")
  )


OPEN = (None, None)


@pytest.mark.parametrize(
  ("asked", "shape", "colour"),
  [
    ([("what is the blue shape?", "rectangle")], "rectangle", "blue"),
    ([("what color is the circle?", "red")], "circle", "red"),
    ([("what is the color of the shape?", "teal")], None, "teal"),
    ([("what shape is present?", "triangle")], "triangle", None),
    ([("is there a circle?", "yes")], "circle", None),
    ([("is there a circle?", "no")], None, None),
    ([("is no gray shape present?", "no")], None, "gray"),
    ([("is no gray shape present?", "yes")], None, None),
    ([("does the image not contain a circle?", "no")], "circle", None),
    ([("is there not a red shape in the image?", "yes")], None, None),
    # No answer says that a picture shows anything at all, or one thing only.
    ([("is a circle present?", "no"), ("is there a triangle?", "no")], *OPEN),
    ([("is a circle present?", "yes"), ("is there a triangle?", "yes")], *OPEN),
    ([], None, None),
  ],
)
def test_shape_and_colour(asked, shape, colour):
  assert sources.shape_and_colour(asked) == (shape, colour)


def drawn(path):
  """Says what an easy-VQA picture shows, from its pixels alone."""
  colours = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 128, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
  }
  with Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB")).astype(int)
  ground = np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
  figure = np.abs(pixels - ground).sum(-1) > 60
  shown = np.median(pixels[figure], axis=0)
  colour = min(colours, key=lambda k: np.abs(shown - colours[k]).sum())
  rows, columns = np.nonzero(figure)
  # A triangle fills half of its box, a circle pi / 4 of it.
  filled = figure.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
  shape = ("triangle", "circle", "rectangle")[np.digitize(filled, [0.69, 0.92])]
  return f"{colour} {shape}"


def test_easy_vqa_captions_say_what_is_drawn(easy_vqa):
  import easy_vqa as package

  for split, source, paths, total in (
    ("train", easy_vqa[0], package.get_train_image_paths(), 38575),
    ("test", easy_vqa[1], package.get_test_image_paths(), 9673),
  ):
    said = dict(zip((i["name"] for i in source.items), source.annotations))
    labelled = {name: a.label for name, a in said.items() if a.label}
    assert 0.87 < len(labelled) / len(source) < 0.91
    right = [drawn(paths[int(n)]) == label for n, label in labelled.items()]
    assert np.mean(right) > 0.99
    for annotation in said.values():
      label = annotation.label
      assert annotation.captions == ((f"a {label}",) if label else ())
    # Every published question, and in the published order.
    dialogues = [(n, *d) for n, a in said.items() for d in a.dialogues]
    assert len(dialogues) == total
    published = sources.easy_vqa_questions(split)
    assert [d for n, d in dialogues if n == "7"] == [
      (question, answer) for question, answer, name in published if name == "7"
    ]
    assert set(dialogues) == {(name, (q, a)) for q, a, name in published}


def test_chatterbot_is_split_by_question():
  train, heldout = sources.load_chatterbot(0.1)
  assert len(train) > 900 and 50 < len(heldout) < 200
  assert len(set(train + heldout)) == len(train) + len(heldout)

  def first_questions(side):
    return {c.turns[0][0].lower().strip(" ?.!") for c in side}

  assert not first_questions(train) & first_questions(heldout)
  pairs = [pair for c in train + heldout for pair in c.turns]
  assert all(isinstance(x, str) and x for pair in pairs for x in pair)
  assert ("What language are you written in?", "Python.") in pairs
  assert any(len(c.turns) > 2 for c in train)
  # Alternative answers are not the next turn of a dialogue.
  assert ("What is your fear", "The off switch.") in pairs
  # A bare Yes is a string, not a truth value.
  assert ("Have you felt", "Yes.") in pairs


@pytest.mark.parametrize(
  ("module", "load"),
  [
    ("resvg_py", lambda d: sources.load_openmoji(8, cache_dir=d)),
    ("emoji", lambda d: sources.load_openmoji(8, cache_dir=d)),
    ("easy_vqa", lambda d: sources.load_easy_vqa(8, cache_dir=d)),
    ("chatterbot_corpus", lambda d: sources.load_chatterbot()),
  ],
)
def test_missing_package(monkeypatch, tmp_path, module, load):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(
    ValueError, match=rf'{module}.*pip install -e "\.\[demo\]"'
  ):
    load(tmp_path)


def decode(image, size=8, image_format="PNG", **kwargs):
  stream = io.BytesIO()
  image.save(stream, image_format, **kwargs)
  stream.seek(0)
  return sources.decode_image(stream, size)


RED, WHITE = (255, 0, 0), (255, 255, 255)


def constant(mode, color, size=(20, 10)):
  return Image.new(mode, size, color)


def palette(transparent):
  image = constant("P", 1)
  image.putpalette([0, 255, 0, 255, 0, 0])
  image.info = {"transparency": 1} if transparent else {}
  return image


@pytest.mark.parametrize(
  ("image", "kwargs", "color"),
  [
    (constant("RGB", RED), {}, RED),
    (palette(False), {}, RED),
    (palette(True), {"transparency": 1}, WHITE),
    (constant("RGBA", (*RED, 0)), {}, WHITE),
    (constant("RGBA", (*RED, 255)), {}, RED),
    (constant("RGBA", (0, 0, 0, 51)), {}, (204,) * 3),
    (constant("LA", (0, 51)), {}, (204,) * 3),
    (constant("L", 77), {}, (77,) * 3),
    (constant("1", 1), {}, WHITE),
    (constant("I;16", 257 * 100), {}, (100,) * 3),
    (constant("I;16", 100), {}, (0,) * 3),
    (constant("I", 257 * 100), {"image_format": "TIFF"}, (100,) * 3),
    (constant("F", 0.2), {"image_format": "TIFF"}, (51,) * 3),
    (constant("F", 130.0), {"image_format": "TIFF"}, (130,) * 3),
    (constant("CMYK", (0, 255, 255, 0)), {"image_format": "TIFF"}, RED),
    (
      constant("CMYK", (0, 255, 255, 0)),
      {"image_format": "JPEG", "quality": 100},
      RED,
    ),
  ],
)
def test_every_mode_becomes_rgb(image, kwargs, color):
  out = decode(image, **kwargs)
  assert out.dtype == np.uint8 and out.shape == (8, 8, 3)
  assert np.abs(out.astype(int) - color).max() <= (
    2 if kwargs.get("image_format") == "JPEG" else 0
  )


def halves(width, height, axis):
  """Red on the left or the top, blue elsewhere."""
  array = np.zeros((height, width, 3), np.uint8)
  array[..., 2] = 255
  half = np.s_[:, : width // 2] if axis == 1 else np.s_[: height // 2]
  array[half] = RED
  return Image.fromarray(array)


def test_exif_rotation():
  exif = Image.Exif()
  exif[0x0112] = 6  # Turn by 90 degrees clockwise to see it upright.
  out = decode(halves(32, 32, 1), image_format="PNG", exif=exif)
  # What was on the left is on top.
  assert (out[:3, :, 0] > 200).all() and (out[-3:, :, 2] > 200).all()


@pytest.mark.parametrize("size", [(300, 100), (100, 300)])
def test_central_square(size):
  array = np.zeros((size[1], size[0], 3), np.uint8)
  if size[0] > size[1]:
    array[:, 100:200] = 255
  else:
    array[100:200] = 255
  out = decode(Image.fromarray(array), 10)
  assert (out[1:-1, 1:-1] > 250).all()  # The white centre and nothing else.
  assert out.min() > 180


def test_resizing_is_antialiased():
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 255
  out = decode(Image.fromarray(stripes), 8)
  assert np.abs(out.astype(int) - 128).max() < 8


def test_first_frame_of_an_animation():
  out = decode(
    constant("RGB", RED),
    image_format="GIF",
    save_all=True,
    append_images=[constant("RGB", (0, 0, 255))],
  )
  assert (out == RED).all()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
  st.integers(1, 90),
  st.integers(1, 90),
  st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
  st.integers(1, 40),
)
def test_any_size_and_mode(width, height, mode, size):
  out = decode(Image.new(mode, (width, height)), size)
  assert out.shape == (size, size, 3) and out.dtype == np.uint8
  # Zero is black, or transparent and hence white.
  assert (out == (255 if mode in ("LA", "RGBA") else 0)).all()


@pytest.fixture
def folder(tmp_path):
  """Forty good images in two folders, and things that are not images."""
  root = tmp_path / "images"
  for i in range(40):
    path = root / ("deep/er" if i % 2 else ".") / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12 + i, 9), (i, 0, 0)).save(path)
  (root / "._7.png").write_bytes(b"a Mac's resource fork")
  (root / "notes.txt").write_text("no image")
  (root / ".thumbnails").mkdir()
  Image.new("RGB", (4, 4)).save(root / ".thumbnails" / "x.png")
  os.symlink(root, root / "deep" / "loop")
  return root


def load(folder, **kwargs):
  kwargs = {"cache_dir": folder.parent / "cache", **kwargs}
  return sources.load_folder(folder, 4, **kwargs)


def names(source):
  return {item["name"] for item in source.items}


def test_folder(folder):
  train, heldout = load(folder)
  everything = {f"deep/er/{i}.png" if i % 2 else f"{i}.png" for i in range(40)}
  assert names(train) | names(heldout) == everything
  assert not names(train) & names(heldout)
  assert names(heldout) == {n for n in everything if sources.is_heldout(n, 0.1)}
  for source in (train, heldout):
    for item, image in zip(source.items, source.images(), strict=True):
      number = int(item["name"].split("/")[-1][:-4])
      assert (image == (number, 0, 0)).all()


def test_folder_changes_are_seen_and_move_nothing(folder):
  _, before = load(folder)
  Image.new("RGB", (5, 5), (200, 0, 0)).save(folder / "0.png")
  Image.new("RGB", (5, 5), (201, 0, 0)).save(folder / "new.png")
  train, after = load(folder)
  assert names(after) - {"new.png"} == names(before)
  images = {
    item["name"]: image
    for source in (train, after)
    for item, image in zip(source.items, source.images(), strict=True)
  }
  assert (images["0.png"] == (200, 0, 0)).all() and "new.png" in images


def test_folder_drops_copies_of_heldout_images(folder):
  _, heldout = load(folder)
  original = heldout.items[0]["name"]
  copies = [f"copy{i}.png" for i in range(20)]
  for copy in copies:
    (folder / copy).write_bytes((folder / original).read_bytes())
  train, heldout = load(folder)
  assert not names(train) & set(copies)
  assert not pixels_of(train) & pixels_of(heldout)


def test_folder_with_broken_images(folder, caplog):
  (folder / "text.png").write_text("this is no image")
  whole = (folder / "8.png").read_bytes()
  (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
  os.symlink(folder / "nowhere.png", folder / "dangling.png")
  with caplog.at_level(logging.WARNING):
    train, heldout = load(folder)
  assert len(train) + len(heldout) == 40
  assert "skipped 3 of 43" in caplog.text
  for name in ("text.png", "cut.png", "dangling.png"):
    assert name in caplog.text and name not in names(train) | names(heldout)


def test_folder_with_too_many_broken_images(folder):
  for i in range(11):
    (folder / f"broken{i}.png").write_text("")
  with pytest.raises(ValueError, match=r"(?s)11 of .*more than the 10.*broken"):
    load(folder)
  train, heldout = load(folder, max_broken=0.3)  # 15 of 51.
  assert len(train) + len(heldout) == 40


def test_folder_errors(tmp_path, folder):
  with pytest.raises(ValueError, match="is not a folder"):
    load(tmp_path / "missing")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"no image in .*\.jpeg"):
    load(tmp_path / "empty")
  with pytest.raises(ValueError, match="too few to hold out"):
    load(folder, heldout_fraction=0.0)


def test_captions(folder, caplog):
  lines = [
    {"image": f"{i}.png", "text": f"number {i}"} for i in range(0, 40, 2)
  ]
  lines += [
    {"image": "./0.png", "text": "zéro"},
    {"image": "gone.png", "text": "?"},
  ]
  file = folder / "captions.jsonl"
  file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
  with caplog.at_level(logging.WARNING):
    train, heldout = load(folder, captions=file)
  assert "1 captions name images" in caplog.text and "gone.png" in caplog.text
  for source in (train, heldout):
    for item, said in zip(source.items, source.annotations, strict=True):
      number = item["name"][:-4]
      expected = () if "/" in item["name"] else (f"number {number}",)
      assert said.captions[:1] == expected
  assert sources.Annotation(captions=("number 0", "zéro")) in (
    train.annotations + heldout.annotations
  )
  said = [c.turns[0][1] for c in sources.caption_conversations(train)]
  kept = [c.turns[0][1] for c in sources.caption_conversations(heldout)]
  assert not set(said) & set(kept) and len(said) + len(kept) == 21


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"image": "0.png", "text": "ok"}\nnonsense', "line 2: want"),
    ('{"image": "0.png"}', "line 1: want"),
    ('{"image": "0.png", "text": 3}', "line 1: want"),
    ("[1]", "line 1: want"),
    ('{"image": "0.png", "text": "\\ud800"}', "line 1: want"),
    ('{"image": "/abs/0.png", "text": "x"}', "must be relative"),
    ("", "must be relative"),
  ],
)
def test_bad_captions(folder, text, message):
  file = folder / "captions.jsonl"
  file.write_text(text)
  with pytest.raises(ValueError, match=message):
    load(folder, captions=file)


def test_a_caption_may_hold_any_character(folder):
  """A line of JSON may hold what str.splitlines takes for a line's end."""
  said = "one\u2028two\x85three"
  file = folder / "captions.jsonl"
  line = json.dumps({"image": "0.png", "text": said}, ensure_ascii=False)
  file.write_text(line + "\r\n", encoding="utf-8", newline="")
  captions = [
    a.captions for s in load(folder, captions=file) for a in s.annotations
  ]
  assert (said,) in captions


def test_captions_in_another_encoding(folder):
  file = folder / "captions.jsonl"
  file.write_bytes('{"image": "0.png", "text": "zéro"}'.encode("latin-1"))
  with pytest.raises(ValueError, match="is not UTF-8"):
    load(folder, captions=file)


def test_missing_captions_file(folder):
  with pytest.raises(ValueError, match="is not a file"):
    load(folder, captions=folder / "none.jsonl")


def test_large_heldout_sets_are_capped_but_not_trained_on(folder, monkeypatch):
  monkeypatch.setattr(sources.source, "MAX_HELDOUT", 3)
  train, heldout = load(folder, heldout_fraction=0.5)
  assert len(heldout) == 3
  assert not any(sources.is_heldout(n, 0.5) for n in names(train))
