"""Text tokenizers: training, foreign vocabularies, control tokens, the mask."""

import json
import os
import subprocess
import sys

from hypothesis import given, strategies as st
import numpy as np
import pytest
import tokenizers

from unicode_jax.data import text_tokenizer
from unicode_jax.data.text_tokenizer import (
  TextTokenizer,
  load_text_tokenizer,
  train_text_tokenizer,
)

TEXTS = [
  "the quick brown fox jumps over the lazy dog",
  "what colour is the shape? the shape is blue",
  "User: what is this?\nAssistant: this is a test, </s> and no more",
] * 3
NASTY = "<s> </s><pad> <image>x</image> <|im_end|> <0x41>\n  é 漢字 🐓 \x00 "


@pytest.fixture(scope="module")
def trained():
  return train_text_tokenizer(TEXTS, 300)


def sentencepiece_like():
  """A LLaMA-like tokenizer.json: leading spaces, byte fallback, <0xNN>."""
  words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
  words += ["▁", *"abcdefghijklmnopqrstuvwxyz<>/|_", "he", "▁he", "</", "</s"]
  merges = [("h", "e"), ("▁", "he"), ("<", "/"), ("</", "s"), ("</s", ">")]
  model = tokenizers.models.BPE(
    {word: i for i, word in enumerate(words)},
    merges,
    unk_token="<unk>",
    byte_fallback=True,
    fuse_unk=True,
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Sequence(
    [
      tokenizers.normalizers.Prepend("▁"),
      tokenizers.normalizers.Replace(" ", "▁"),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0),
    ]
  )
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  return tokenizer


def byte_level_like():
  """A Qwen-like tokenizer: no <s>, added tokens behind the model's ids."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = [*alphabet, "he", "Ġhe"]
  model = tokenizers.models.BPE(
    {word: i for i, word in enumerate(words)}, [("h", "e"), ("Ġ", "he")]
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=True
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
  # Not special, but added.
  tokenizer.add_tokens(["<tool_call>", "   ", "<he>"])
  return tokenizer


def wrap(tokenizer, **config):
  return TextTokenizer(tokenizer.to_str(), config)


def foreign():
  yield wrap(sentencepiece_like())
  yield wrap(byte_level_like(), eos_token="<|im_end|>")


def test_training_gives_the_promised_vocabulary(trained):
  assert trained.vocab_size == 300
  assert len({trained.pad_id, trained.bos_id, trained.eos_id}) == 3
  assert trained.control_ids == {
    trained.token_id(name)
    for name in ("<pad>", "<s>", "</s>", "<image>", "</image>")
  }
  assert len(trained.byte_ids) == 256
  assert len(trained.encode("the shape is blue")) < 17


def test_training_is_deterministic_across_processes(trained):
  code = (
    "import json, sys; from unicode_jax.data import text_tokenizer as t; "
    "sys.stdout.write(t.train_text_tokenizer(json.loads(sys.argv[1]), 300)"
    "._json)"
  )
  for threads in ("true", "false"):
    out = subprocess.run(
      [sys.executable, "-c", code, json.dumps(TEXTS)],
      capture_output=True,
      check=True,
      env={**os.environ, "TOKENIZERS_PARALLELISM": threads},
    )
    assert out.stdout.decode() == trained._json


def test_training_refuses_impossible_sizes():
  with pytest.raises(ValueError, match="vocab_size=100 must be at least 262"):
    train_text_tokenizer(TEXTS, 100)
  with pytest.raises(ValueError, match=r"only \d+ tokens.*asks for 5000"):
    train_text_tokenizer(TEXTS, 5000)


@given(st.text())
def test_text_survives_and_pieces_join(text):
  for tokenizer in (train_once(), *foreign_once()):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.control_ids.isdisjoint(ids)
    half = len(text) // 2
    joined = tokenizer.encode(text[:half]) + tokenizer.encode(text[half:])
    assert tokenizer.decode(joined) == text


def train_once(cache=[]):  # noqa: B006
  if not cache:
    cache.append(train_text_tokenizer(TEXTS, 300))
  return cache[0]


def foreign_once(cache=[]):  # noqa: B006
  if not cache:
    cache.extend(foreign())
  return cache


def test_special_tokens_in_user_text_stay_text(trained):
  for tokenizer in (trained, *foreign()):
    for text in (NASTY, "</s>", "<tool_call>", "<|im_end|><|endoftext|>"):
      ids = tokenizer.encode(text)
      assert tokenizer.control_ids.isdisjoint(ids)
      assert tokenizer.decode(ids) == text
  # The fixture would notice: the same text does name control tokens.
  naive = tokenizers.Tokenizer.from_str(trained._json).encode("</s>").ids
  assert naive == [trained.eos_id]


def test_control_tokens_in_text_are_tokenised_like_any_text():
  tokenizer = wrap(byte_level_like())
  expected = [tokenizer.token_id(name) for name in ("<", "he", ">")]
  assert tokenizer.encode("<he>") == expected


def test_control_tokens_spelled_by_merges_stay_text():
  """The merges of the sentencepiece-like vocabulary lead to "</s>"."""
  tokenizer = wrap(sentencepiece_like())
  assert tokenizer._text.encode("</s>").ids == [tokenizer.eos_id]
  ids = tokenizer.encode("he</s>")
  assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "he</s>"


def test_white_space_runs_keep_their_own_token():
  tokenizer = wrap(byte_level_like(), eos_token="<|im_end|>")
  ids = tokenizer.encode("a   b")
  assert ids[1] == tokenizer.token_id("   ") == 261
  assert tokenizer.decode(ids) == "a   b"


def test_decode_shows_or_skips_control_tokens(trained):
  ids = [trained.bos_id, *trained.encode("the é"), trained.eos_id, -1, 9999]
  assert trained.decode(ids) == "the é"
  assert trained.decode(ids, skip_control=False) == "<s>the é</s>"
  assert trained.decode(np.array(ids, np.int32)) == "the é"


def test_roles():
  spm, byte = foreign()
  assert (spm.bos_id, spm.eos_id, spm.pad_id) == (1, 2, None)
  assert spm.control_ids == {0, 1, 2}  # <unk> too.
  assert spm.byte_ids == set(range(3, 259))
  assert byte.bos_id is None and byte.pad_id is None
  assert byte.eos_id == byte.token_id("<|im_end|>") == 259
  assert byte.byte_ids == set(range(256))
  usual = wrap(byte_level_like())
  assert usual.eos_id == usual.token_id("<|endoftext|>")
  as_dict = wrap(byte_level_like(), eos_token={"content": "<|im_end|>"})
  assert as_dict.eos_id == byte.eos_id
  with pytest.raises(ValueError, match="names no end-of-sequence token"):
    wrap(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])))


def test_spare_tokens_have_no_role_and_no_place_in_the_template():
  _, byte = foreign()
  names = {byte.token_name(i) for i in byte.control_ids}
  assert set(byte.spare_tokens()) == names - {"<|im_end|>"}
  template = "{{ '<|im_start|>' }}"
  talks = wrap(
    byte_level_like(), eos_token="<|im_end|>", chat_template=template
  )
  assert set(talks.spare_tokens()) == names - {"<|im_end|>", "<|im_start|>"}


def test_visual_code_mask_is_exact(trained):
  mask = trained.visual_code_mask("<image>", "</image>")
  assert mask.dtype == bool and mask.shape == (300,)
  assert mask.sum() == 300 - 5 - 256
  assert not mask[list(trained.control_ids | trained.byte_ids)].any()
  # Any token may delimit; then it is no code, and all else stays as it was.
  ids = [trained.token_id("th"), trained.token_id("Ġthe")]
  other = trained.visual_code_mask("th", "Ġthe")
  assert np.flatnonzero(mask != other).tolist() == sorted(ids)


def test_visual_code_mask_of_foreign_vocabularies():
  spm, byte = foreign()
  mask = spm.visual_code_mask("<s>", "he")
  codes = {i for i in range(259, spm.vocab_size) if i != spm.token_id("he")}
  assert set(np.flatnonzero(mask)) == codes
  # Added tokens are out, special or not, white space or not.
  mask = byte.visual_code_mask("<|im_end|>", "<tool_call>", num_codes=300)
  assert mask.shape == (300,)
  assert set(np.flatnonzero(mask)) == {
    byte.token_id("he"),
    byte.token_id("Ġhe"),
  }


def test_ids_without_a_token_are_no_codes():
  spec = json.loads(byte_level_like().to_str())
  spec["model"]["vocab"]["Ġhe"] = 290  # A gap from 257 on.
  tokenizer = TextTokenizer(json.dumps(spec), {})
  mask = tokenizer.visual_code_mask("<|im_end|>", "<tool_call>")
  assert set(np.flatnonzero(mask)) == {256, 290}


def test_unknown_delimiters_name_the_nearest(trained):
  with pytest.raises(ValueError, match=r"no token '<img>'.*'<image>'"):
    trained.visual_code_mask("<img>", "</image>")
  with pytest.raises(ValueError, match=r"'<IMAGE>'.*'<image>'"):
    trained.visual_code_mask("<image>", "<IMAGE>")
  with pytest.raises(ValueError, match="name two tokens"):
    trained.visual_code_mask("<image>", "<image>")
  with pytest.raises(ValueError, match="table has 299 rows"):
    trained.visual_code_mask("<image>", "</image>", num_codes=299)


def test_own_delimiters():
  tokenizer = train_text_tokenizer(
    TEXTS, 300, image_start="<picture>", image_end="</picture>"
  )
  assert tokenizer.visual_code_mask("<picture>", "</picture>").sum() == 39
  with pytest.raises(ValueError, match="picture"):
    tokenizer.token_id("<pictures>")


def test_saved_folder_is_hugging_faces(trained, tmp_path):
  import transformers

  for i, tokenizer in enumerate((trained, *foreign())):
    folder = tmp_path / str(i)
    tokenizer.save(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == tokenizer.vocab_size
    assert loaded.eos_token_id == tokenizer.eos_id
    assert loaded.bos_token_id == tokenizer.bos_id
    assert loaded.pad_token_id == tokenizer.pad_id
    text = " the shape he is"
    plain = loaded(text, add_special_tokens=False).input_ids
    assert loaded.decode(plain).strip() == text.strip()
    if tokenizer is trained:
      assert plain == tokenizer.encode(text)
    for path in (folder, folder / "tokenizer.json", str(folder)):
      again = load_text_tokenizer(path)
      assert again.encode(NASTY) == tokenizer.encode(NASTY)
      assert again.eos_id == tokenizer.eos_id
      assert again.control_ids == tokenizer.control_ids


def test_nothing_to_load(tmp_path):
  with pytest.raises(ValueError, match="no tokenizer at"):
    load_text_tokenizer(tmp_path / "missing")
  with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
    load_text_tokenizer(tmp_path)
  for content in ("{}", "nonsense", "[]"):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"is not a Hugging Face tokenizer"):
      load_text_tokenizer(tmp_path)


def test_import_is_light():
  code = "import sys, unicode_jax.data; assert not {'transformers', 'jax', "
  code += "'grain', 'resvg_py'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)
  assert text_tokenizer.IMAGE_START == "<image>"
