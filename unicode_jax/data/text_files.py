"""Text that others wrote: bounded, Unicode, JSON, and safe to show.

Files found in the wild hold anything. What reads them gets a text or a
`ValueError` from here, and what names them in a message stays one line.
Nothing here knows what a text is about.
"""

from pathlib import Path

from unicode_jax import config as config_lib

# A longer caption, question or answer is no text to train on, bytes.
MAX_TEXT_BYTES = 2**20


def read_utf8(file: Path) -> str:
  """Reads a text file; a ConfigError where it is not UTF-8."""
  try:
    return file.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise config_lib.ConfigError(
      f"{file} is not UTF-8 text ({error}): convert it"
    ) from error


def check_text(text: str) -> None:
  """Raises ValueError for half of a surrogate pair, or too long a text."""
  if len(text) > MAX_TEXT_BYTES or len(text.encode()) > MAX_TEXT_BYTES:
    raise ValueError(
      f"a text of {len(text)} characters: more than {MAX_TEXT_BYTES} bytes"
    )


def printable(text: str) -> str:
  """Returns a text with line breaks, escapes and broken characters spelled."""
  if text.isprintable():
    return text
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
