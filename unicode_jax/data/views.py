"""Views of an image that training draws from: mirrored, moved a little.

There are few of them and they are the same for every image, so that the codes
of all can be kept (`code_cache`), and a cache and the pixels give training the
same codes. No JAX, though `see` takes its arrays too.
"""

from typing import NamedTuple

import numpy as np

# Places that an image is moved to, its own among them.
PLACES = 8


class View(NamedTuple):
  """How an image is seen.

  Attributes:
    mirrored: left to right, before it is moved.
    down: pixels that it is moved down, or up where negative.
    right: pixels that it is moved to the right, or to the left.
  """

  mirrored: bool = False
  down: int = 0
  right: int = 0


AS_IS = View()


def views(flip: bool, shift: int) -> tuple[View, ...]:
  """Returns the views that augmentation draws from, `AS_IS` first.

  Args:
    flip: whether mirror images are among them.
    shift: largest movement in either direction, pixels; 0 for none.
  """
  places = [(0, 0)]
  if shift:
    moves = [
      (down, right)
      for down in range(-shift, shift + 1)
      for right in range(-shift, shift + 1)
      if down or right
    ]
    order = np.random.default_rng(0).permutation(len(moves))
    places += [moves[i] for i in order[: PLACES - 1]]
  return tuple(
    View(mirrored, *place)
    for place in places
    for mirrored in ((False, True) if flip else (False,))
  )


def see(images: np.ndarray, view: View) -> np.ndarray:
  """Returns a view of images; where one moves away, its edge is repeated.

  Args:
    images: [..., S, S, channels], of numpy or of JAX.
    view: which.
  """
  if view.mirrored:
    images = images[..., ::-1, :]
  if not view.down and not view.right:
    return images
  pixels = np.arange(images.shape[-2])
  rows, columns = (
    np.clip(pixels - moved, 0, len(pixels) - 1)
    for moved in (view.down, view.right)
  )
  return images[..., rows[:, None], columns, :]
