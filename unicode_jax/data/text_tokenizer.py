"""Text tokenizers: train a byte-level BPE, or load any Hugging Face tokenizer.

A text token is a visual code (METHOD.md section 1), so this file also says
which ids may be one (hazard H9): every id that is neither a control token, nor
an added token, nor a raw byte, nor an image delimiter.

`transformers` is imported only for folders without a `tokenizer.json`.
"""

from collections.abc import Iterable, Sequence
import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from unicode_jax import config as config_lib, files

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
IMAGE_START, IMAGE_END = "<image>", "</image>"

# Looked up in this order where the files don't name a token's role.
_USUAL_NAMES = {
  "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]"),
  "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]"),
  "pad": ("<pad>", "<|pad|>", "[PAD]"),
}


class TextTokenizer:
  """A Hugging Face tokenizer whose text can never become control tokens.

  Attributes:
    vocab_size: K, one more than the largest id.
    bos_id: opens a conversation, or None (Qwen has none).
    eos_id: ends an answer.
    pad_id: or None.
    control_ids: ids that `encode` never returns: every added or special token
      except runs of white space, which some vocabularies add as plain text.
    byte_ids: the raw byte tokens: the 256 letters of a byte-level vocabulary,
      or <0x00>..<0xFF> of a sentencepiece one. Some vocabularies lack the bytes
      that UTF-8 never uses.
  """

  def __init__(self, tokenizer_json: str, config: dict[str, Any]):
    """Wraps the contents of two files; see `load_text_tokenizer`.

    Args:
      tokenizer_json: contents of `tokenizer.json`.
      config: contents of `tokenizer_config.json`; may be empty.

    Raises:
      ConfigError: no end-of-sequence token is named or has a usual name.
    """
    self._json = tokenizer_json
    spec = config_lib.parse_json(tokenizer_json)
    self._vocab = _from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    if not self._vocab:
      raise config_lib.ConfigError(
        "the tokenizer has no vocabulary: give a whole tokenizer.json"
      )
    self._names = {id_: name for name, id_ in self._vocab.items()}
    self.vocab_size = max(self._vocab.values()) + 1
    self.bos_id = self._role(config, "bos")
    self.eos_id = self._role(config, "eos")
    self.pad_id = self._role(config, "pad")
    if self.eos_id is None:
      raise config_lib.ConfigError(
        "the tokenizer names no end-of-sequence token: add "
        f'"eos_token" to its tokenizer_config.json (usual names: '
        f"{', '.join(_USUAL_NAMES['eos'])})"
      )
    self._config = dict(config)
    for role in _USUAL_NAMES:
      id_ = getattr(self, f"{role}_id")
      if id_ is not None:
        self._config[f"{role}_token"] = self._names[id_]
    added = spec.get("added_tokens") or []
    for token in added:
      if self._vocab.get(token["content"]) != token["id"]:
        raise config_lib.ConfigError(
          f"tokenizer.json gives the token {token['content']!r:.99} the id "
          f"{token['id']}, which is not its own: fetch it again"
        )
    self._added_ids = frozenset(token["id"] for token in added)
    unknown = spec["model"].get("unk_token")
    if "unk_id" in spec["model"]:  # Unigram
      unknown = self._names.get(spec["model"]["unk_id"])
    special = {self.bos_id, self.eos_id, self.pad_id, self._vocab.get(unknown)}
    self.control_ids = frozenset(
      token["id"] for token in added if token["content"].strip()
    ) | frozenset(special - {None})
    self.byte_ids = self._find_bytes(tokenizer_json)
    self._text = _from_str(json.dumps(_plain(spec)))
    self._text.encode_special_tokens = True  # As text, that is.

  def __reduce__(self):
    # `encode_special_tokens` does not survive a trip to another process.
    return TextTokenizer, (self._json, self._config)

  def _role(self, config: dict[str, Any], role: str) -> int | None:
    """Returns the id of bos, eos or pad."""
    named = config.get(f"{role}_token")
    if isinstance(named, dict):
      named = named.get("content")
    if not isinstance(named, str | None):
      raise config_lib.ConfigError(
        f"tokenizer_config.json has {role}_token={named!r:.99}: it must be the "
        "name of a token"
      )
    if f"{role}_token" in config:
      return self.token_id(named) if named else None
    known = [self._vocab[n] for n in _USUAL_NAMES[role] if n in self._vocab]
    return known[0] if known else None

  def _find_bytes(self, tokenizer_json: str) -> frozenset[int]:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if names[0] not in self._vocab and '"ByteLevel"' in tokenizer_json:
      names = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return frozenset(self._vocab[n] for n in names if n in self._vocab)

  def token_id(self, name: str) -> int:
    """Returns the id of a token of the vocabulary, spelled as it is there.

    Raises:
      ConfigError: there is none; names the nearest ones.
    """
    if name not in self._vocab:
      lower = {token.lower(): token for token in self._vocab}
      near = difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)
      shown = ", ".join(repr(lower[token]) for token in near)
      raise config_lib.ConfigError(
        f"the vocabulary has no token {name!r}; "
        + (f"nearest: {shown}" if shown else "nothing in it is like it")
      )
    return self._vocab[name]

  def token_name(self, id_: int) -> str:
    """Returns how the vocabulary spells a token."""
    return self._names[id_]

  def spare_tokens(self) -> list[str]:
    """Returns control tokens that no role or chat template uses, by id.

    Text never holds them, so they can open and close images.
    """
    used = {self.bos_id, self.eos_id, self.pad_id}
    template = str(self._config.get("chat_template", ""))
    named = (self._names[id_] for id_ in sorted(self.control_ids - used))
    return [name for name in named if name not in template]

  def encode(self, text: str) -> list[int]:
    """Tokenises text; returns ids none of which is a control token.

    "</s>" in the text comes out as the pieces "<", "/s", ">" or the like. No
    space is put in front, as sentencepiece does at the start of a text, so the
    ids of pieces can be joined.

    Raises:
      ConfigError: the text is no Unicode: it has half of a surrogate pair.
    """
    ids = self._pieces(text)
    if self.control_ids.isdisjoint(ids):
      return ids
    # A model can spell a control token by merges (Llama 3, Unigram), or not
    # know a character: go on without what it may not say.
    kept = []
    for id_ in ids:
      name = self._names[id_]
      if id_ not in self.control_ids:
        kept.append(id_)
      elif len(name) > 1:
        for character in name:
          pieces = self._pieces(character)
          kept.extend(i for i in pieces if i not in self.control_ids)
    return kept

  def _pieces(self, text: str) -> list[int]:
    try:
      return self._text.encode(text, add_special_tokens=False).ids
    except TypeError:
      raise config_lib.ConfigError(
        f"{text[:60]!r} is no text: it has half of a surrogate pair, or bytes "
        "that are not UTF-8"
      ) from None
    except Exception as error:  # Of no type of its own.
      raise config_lib.ConfigError(
        f"the text tokenizer cannot encode {text!r:.99} ({error}): take one "
        "that has a token for what it does not know"
      ) from error

  def decode(self, ids: Iterable[int], *, skip_control: bool = True) -> str:
    """Returns the text of ids; control tokens by name unless skipped.

    Ids that no token has (padding of the embedding table) are skipped.
    """
    text, run = [], []
    for id_ in ids:
      id_ = int(id_)
      if id_ in self._added_ids or id_ in self.control_ids:
        text.append(self._text.decode(run, skip_special_tokens=False))
        run = []
        if not (skip_control and id_ in self.control_ids):
          text.append(self._names[id_])
      elif id_ in self._names:
        run.append(id_)
    text.append(self._text.decode(run, skip_special_tokens=False))
    return "".join(text)

  def visual_code_mask(
    self, image_start: str, image_end: str, num_codes: int | None = None
  ) -> np.ndarray:
    """Says which ids may be visual codes (hazard H9).

    Args:
      image_start: name of the token that opens an image.
      image_end: name of the token that closes one; another one.
      num_codes: K, rows of the LLM's table; None for `vocab_size`. Rows behind
        the vocabulary are never visual codes.

    Returns:
      bool[K], False for added and special tokens, raw bytes, the delimiters
      and ids that no token has.

    Raises:
      ConfigError: a delimiter is not in the vocabulary (names the nearest
        tokens), both are the same, or K is below `vocab_size`.
    """
    num_codes = self.vocab_size if num_codes is None else num_codes
    if num_codes < self.vocab_size:
      raise config_lib.ConfigError(
        f"the table has {num_codes} rows, the tokenizer {self.vocab_size} "
        "ids: set config.text.vocab_size to at least that"
      )
    if image_start == image_end:
      raise config_lib.ConfigError(
        f"image_start and image_end are both {image_start!r}: name two tokens"
      )
    mask = np.zeros(num_codes, bool)
    mask[list(self._names)] = True
    never = self.control_ids | self._added_ids | self.byte_ids
    mask[list(never)] = False
    mask[[self.token_id(image_start), self.token_id(image_end)]] = False
    return mask

  @property
  def digest(self) -> str:
    """Returns what two tokenizers share that give texts the same ids."""
    roles = json.dumps([self.bos_id, self.eos_id])
    return hashlib.sha256((self._json + roles).encode()).hexdigest()

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes a folder that `AutoTokenizer.from_pretrained` loads."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever class the tokenizer came from, tokenizer.json says all of it.
    config = {**self._config, "tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("auto_map", None)
    for name, text in (
      ("tokenizer.json", self._json),
      ("tokenizer_config.json", json.dumps(config, indent=2)),
    ):
      files.write_whole(folder / name, text)

  def save_plain(self, path: str | os.PathLike[str]) -> None:
    """Writes what `encode` uses as one file, for the library `tokenizers`.

    There, `encode_special_tokens` must be set to the same effect.
    """
    self._text.save(str(path))


def _from_str(text: str) -> tokenizers.Tokenizer:
  """Makes a tokenizer of JSON that anyone may have written.

  Raises:
    ConfigError: it describes none.
  """
  try:
    return tokenizers.Tokenizer.from_str(text)
  # Its errors are of no type of their own, or of one that is no Exception:
  # what panics in its Rust.
  except BaseException as error:
    if not isinstance(error, Exception) and not _is_panic(error):
      raise
    raise config_lib.ConfigError(
      f"tokenizer.json describes no tokenizer ({error}): fetch it again"
    ) from None


def _is_panic(error: BaseException) -> bool:
  """Says whether an error is a panic of Rust, whose type is not public."""
  return type(error).__name__ == "PanicException"


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
  """Edits a tokenizer.json into one for text alone.

  Every added token but runs of white space becomes a special one, which can be
  switched off (removing them would shift the others' ids). No space is added in
  front and none stripped: text -> ids -> text is exact, pieces can be joined.
  """
  added = spec.get("added_tokens") or []
  spec = {
    **spec,
    "added_tokens": [
      {**token, "special": bool(token["content"].strip())} for token in added
    ],
    "truncation": None,
    "padding": None,
    "post_processor": None,
  }

  def edit(node):
    if not isinstance(node, dict):
      return node
    node = dict(node)
    for key in ("normalizers", "pretokenizers", "decoders"):
      if key in node:
        children = [edit(child) for child in node[key]]
        node[key] = [child for child in children if child is not None]
    kind = node.get("type")
    if kind == "Prepend" or (kind == "Strip" and "content" in node):
      return None
    if kind == "Metaspace":
      node["prepend_scheme"] = "never"
    if kind == "ByteLevel":
      node["add_prefix_space"] = False
    return node

  for part in ("normalizer", "pre_tokenizer", "decoder"):
    spec[part] = edit(spec.get(part))
  return spec


def train_text_tokenizer(
  texts: Sequence[str],
  vocab_size: int,
  *,
  image_start: str = IMAGE_START,
  image_end: str = IMAGE_END,
) -> TextTokenizer:
  """Trains a byte-level BPE; the same texts always give the same tokenizer.

  Args:
    texts: what to learn the merges from.
    vocab_size: K, all included: 5 control tokens, 256 bytes, merges.
    image_start: name of the token that opens an image.
    image_end: name of the token that closes one.

  Raises:
    ConfigError: `vocab_size` leaves no room for merges, or the texts are too
      few for it.
  """
  specials = list(dict.fromkeys((PAD, BOS, EOS, image_start, image_end)))
  smallest = len(specials) + 256 + 1
  if vocab_size < smallest:
    raise config_lib.ConfigError(
      f"config.text.vocab_size={vocab_size} must be at least {smallest}: "
      f"{len(specials)} control tokens, 256 bytes and one merge"
    )
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=1,
    special_tokens=specials,
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  if tokenizer.get_vocab_size() < vocab_size:
    raise config_lib.ConfigError(
      f"the text gives only {tokenizer.get_vocab_size()} tokens, "
      f"config.text.vocab_size asks for {vocab_size}: lower it, or give more "
      "text"
    )
  config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
  return TextTokenizer(tokenizer.to_str(), config)


def load_text_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
  """Loads a Hugging Face tokenizer.

  Args:
    path: a folder (whatever `AutoTokenizer` loads) or a `tokenizer.json`.

  Raises:
    ConfigError: there is no tokenizer at that path.
  """
  path = Path(os.path.expanduser(path))
  file = path if path.is_file() else path / "tokenizer.json"
  if file.is_file():
    try:
      text = file.read_text(encoding="utf-8")
      spec = config_lib.parse_json(text)
      if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise ValueError('no "model" in it')
      return TextTokenizer(text, _read_config(file.parent))
    except (OSError, config_lib.ConfigError):
      raise
    # What is no text or no JSON, and what `tokenizers` raises: bare Exceptions.
    except Exception as error:
      raise config_lib.ConfigError(
        f"{file} is not a Hugging Face tokenizer.json, or what lies beside it "
        f"is damaged ({type(error).__name__}: {str(error)[:200]}); give one, "
        "or the folder of a Hugging Face model"
      ) from error
  if not path.is_dir():
    raise config_lib.ConfigError(
      f"no tokenizer at {path}: config.text.tokenizer_path must be a Hugging "
      "Face tokenizer folder or a tokenizer.json"
    )
  import transformers  # Slow to import.

  try:
    loaded = transformers.AutoTokenizer.from_pretrained(
      # Or it would ask at the terminal whether to run code of the folder.
      path,
      local_files_only=True,
      trust_remote_code=False,
    )
    text = loaded.backend_tokenizer.to_str()
  except (OSError, ValueError, ImportError, AttributeError) as error:
    reason = str(error).strip().partition("\n")[0]
    raise config_lib.ConfigError(
      f"the folder {path} has no tokenizer.json, and transformers cannot load "
      f"it either: {reason}"
    ) from error
  special = loaded.special_tokens_map
  roles = [f"{role}_token" for role in _USUAL_NAMES]
  config = {
    role: str(special[role]) if role in special else None for role in roles
  }
  return TextTokenizer(text, config)


def _read_config(folder: Path) -> dict[str, Any]:
  """Merges what the files beside a tokenizer.json say about its tokens."""
  config = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    path = folder / name
    if not path.is_file():
      continue
    try:
      found = config_lib.parse_json(path.read_text(encoding="utf-8"))
      if not isinstance(found, dict):
        raise ValueError("it holds no object")
    except ValueError as error:
      raise config_lib.ConfigError(
        f"{path} cannot be read ({error}): fetch it again"
      ) from None
    config |= found
  return config
