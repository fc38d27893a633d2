"""One image with what is said of it, as bytes that describe themselves.

A record is the length of its header (4 bytes, little-endian), the header (a
JSON object in UTF-8) and the file of the image, as it was or as a PNG:

  name      unique in the folder; decides what is held out
  captions  list of texts
  label     name of the class, or null
  digest    hash of the decoded pixels
  width, height  of the image, pixels

The lines of a shard's index are the headers of its records, in order: all but
the images can be read without the images.
"""

import json
from typing import Any

from unicode_jax import config as config_lib

Header = dict[str, Any]

_LENGTH_BYTES = 4
_FIELDS = {
  **{"name": str, "captions": list, "label": str | None, "digest": str},
  **{"width": int, "height": int},
}


def encode_record(header: Header, image: bytes) -> bytes:
  """Returns a record."""
  text = header_line(header).encode()
  return len(text).to_bytes(_LENGTH_BYTES, "little") + text + image


def header_line(header: Header) -> str:
  """Returns a header as JSON in one line."""
  return json.dumps(header, sort_keys=True, separators=(",", ":"))


def decode_record(record: bytes) -> tuple[Header, bytes]:
  """Returns the header and the image file of a record."""
  start = _LENGTH_BYTES + int.from_bytes(record[:_LENGTH_BYTES], "little")
  return json.loads(record[_LENGTH_BYTES:start]), record[start:]


def image_file(record: bytes) -> bytes:
  """Returns the image file of a record; its header is not read."""
  start = _LENGTH_BYTES + int.from_bytes(record[:_LENGTH_BYTES], "little")
  return record[start:]


def read_header(line: str, where: str) -> Header:
  """Reads a line of an index.

  Args:
    line: JSON.
    where: file and line, for the message.

  Raises:
    ConfigError: it is no header.
  """
  try:
    header = config_lib.parse_json(line)
    if not isinstance(header, dict):
      raise ValueError("it is no object")
    if not header.keys() >= _FIELDS.keys():
      raise ValueError(f"no {sorted(_FIELDS.keys() - header.keys())}")
    for field, kind in _FIELDS.items():
      if not isinstance(header[field], kind):
        raise ValueError(f"{field} is {header[field]!r:.99}")
    if not all(isinstance(text, str) for text in header["captions"]):
      raise ValueError("captions are not all texts")
  except ValueError as error:
    raise config_lib.ConfigError(f"{where} is damaged: {error}") from None
  return header
