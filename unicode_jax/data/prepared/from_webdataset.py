"""WebDataset's tar files: members that share a name up to its first dot.

A sample is an image (`jpg`, `png`, `webp`, ...), a caption (`txt`), a class
(`cls`), and captions and a class in `json`, in any order, side by side.
Archives come from anywhere: nothing is ever written under a member's name,
links and what is no file are passed over, sizes are bounded before they are
read, and a tar that breaks off gives what comes before.
"""

from collections.abc import Iterator
import dataclasses
import io
from pathlib import Path
import tarfile

from unicode_jax import config as config_lib
from unicode_jax.data.prepared.inputs import (
  CAPTION_KEYS,
  LABEL_KEY,
  Broken,
  Columns,
  Inputs,
  Sample,
  find_files,
  read_captions,
  read_label,
  stamped,
)
from unicode_jax.data.sources.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from unicode_jax.data.text_files import MAX_TEXT_BYTES

_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_TEXTS = frozenset({"txt", "cls", "json"})
# What the standard library raises on damaged and on malicious headers.
_DAMAGED = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError)


@dataclasses.dataclass(frozen=True)
class TarPiece:
  """One tar file; see `inputs.Piece`.

  Attributes:
    name: start of the names of its samples.
    path: the file.
    columns: where the fields lie.
  """

  name: str
  path: Path
  columns: Columns

  def samples(self) -> Iterator[Sample | Broken]:
    """Yields the samples in order."""
    seen = set()
    members = _members(self.path)
    key, fields, problem = None, {}, None
    while True:
      try:
        found = next(members, None)
      except (*_DAMAGED, RecursionError) as error:
        yield from self._sample(key, fields, problem)
        yield Broken(self.name, f"damaged, the rest is left out: {error}")
        return
      if found is None or found[0] != key:
        yield from self._sample(key, fields, problem)
        if found is None:
          return
        key, fields, problem = found[0], {}, None
        if key in seen:
          problem = "a second sample of this name: members must be neighbours"
        seen.add(key)
      _, extension, content = found
      if extension in fields:
        problem = f"two members end in .{extension}"
      fields[extension] = content
      if isinstance(content, str):
        problem = content

  def _sample(
    self, key: str | None, fields: dict[str, bytes], problem: str | None
  ) -> Iterator[Sample | Broken]:
    """Yields what became of the members of one name."""
    if key is None:
      return
    name = f"{self.name}/{key}"
    if problem is not None:
      yield Broken(name, problem)
      return
    try:
      yield Sample(name, self._image(fields), *self._said(fields))
    except ValueError as error:
      yield Broken(name, str(error))

  def _image(self, fields: dict[str, bytes]) -> bytes:
    """Returns the image; a ValueError where there is not exactly one."""
    wanted = self.columns.image
    images = [e for e in fields if e in _IMAGES and wanted in (None, e)]
    if len(images) != 1:
      found = " and ".join(images) or f"only {', '.join(fields)}"
      raise ValueError(f"a sample needs one image, but has {found}")
    return fields[images[0]]

  def _said(
    self, fields: dict[str, bytes]
  ) -> tuple[tuple[str, ...], str | None]:
    """Returns captions and label; a ValueError where they cannot be read."""
    texts = {
      extension: content.decode("utf-8-sig")
      for extension, content in fields.items()
      if extension in _TEXTS
    }
    captions, label = texts.get("txt"), texts.get("cls")
    captions = read_captions(captions)
    if "json" in texts:
      known = config_lib.parse_json(texts["json"])
      if not isinstance(known, dict):
        raise ValueError("its json is not an object")
      keys = [self.columns.caption] if self.columns.caption else CAPTION_KEYS
      key = next((key for key in keys if known.get(key) is not None), None)
      captions = read_captions([*captions, *read_captions(known.get(key))])
      if label is None:
        label = known.get(self.columns.label or LABEL_KEY)
    return captions, read_label(label)


def webdataset_inputs(path: str, columns: Columns) -> Inputs:
  """Lists the tar files of a webdataset.

  Args:
    path: one file, a folder or a pattern; see `inputs.find_files`.
    columns: where the fields lie.

  Raises:
    ConfigError: there is no such file.
  """
  files = find_files(path, ".tar")
  return Inputs(
    stamped(files), [TarPiece(name, file, columns) for name, file in files]
  )


class _BoundedFile(io.FileIO):
  """A file of which no header can have gigabytes read into memory."""

  def read(self, size: int = -1) -> bytes:
    """Reads; a ValueError where more is asked for than any member may have."""
    if not 0 <= size <= MAX_IMAGE_BYTES + tarfile.BLOCKSIZE:
      raise ValueError(f"a header asks for {size} bytes")
    return super().read(size)


def _members(path: Path) -> Iterator[tuple[str, str, bytes | str]]:
  """Yields (key, extension, content, or in words why it cannot be read)."""
  with _BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
    offset = -1
    while (member := tar.next()) is not None:
      tar.members.clear()  # Else it remembers every member of a large file.
      if member.offset <= offset or member.size < 0:
        raise ValueError(f"the header after byte {offset} points backwards")
      offset = member.offset
      folder, slash, file_name = member.name.rpartition("/")
      stem, _, extension = file_name.partition(".")
      extension = extension.lower()
      if not stem or extension not in _IMAGES | _TEXTS:
        continue
      if not member.isreg() or member.issparse():
        continue
      limit = MAX_TEXT_BYTES if extension in _TEXTS else MAX_IMAGE_BYTES
      if member.size > limit:
        content = f".{extension} of {member.size} bytes, more than {limit}"
      else:
        content = tar.extractfile(member).read()
        if len(content) != member.size:
          raise tarfile.ReadError("unexpected end of data")
      yield folder + slash + stem, extension, content
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
      raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
