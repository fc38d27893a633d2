"""Views: what moves where, and that few of them serve every image."""

import numpy as np
from PIL import Image
import pytest

from unicode_jax.data import views


def test_the_image_itself_is_the_first():
  assert views.views(flip=False, shift=0) == (views.AS_IS,)
  both = views.views(flip=True, shift=0)
  assert both == (views.AS_IS, views.View(mirrored=True))


@pytest.mark.parametrize(("shift", "places"), [(1, 8), (3, 8)])
def test_places_are_different_and_within_the_shift(shift, places):
  found = views.views(flip=True, shift=shift)
  assert found[0] == views.AS_IS and len(set(found)) == len(found) == 2 * places
  assert found == views.views(flip=True, shift=shift)
  assert {v.mirrored for v in found} == {False, True}
  assert max(max(abs(v.down), abs(v.right)) for v in found) == shift
  assert views.views(flip=False, shift=shift) == tuple(
    v for v in found if not v.mirrored
  )


def test_see_moves_as_an_affine_transform_does():
  """Pillow's inside; the edge repeated where it has nothing to show."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 9, 9, 3), np.uint8)
  for view in views.views(flip=True, shift=3):
    seen = views.see(images, view)
    for image, found in zip(images, seen):
      source = Image.fromarray(image)
      if view.mirrored:
        source = source.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
      moved = np.asarray(
        source.transform(
          (9, 9),
          Image.Transform.AFFINE,
          (1, 0, -view.right, 0, 1, -view.down),
        )
      )
      down, right = view.down, view.right
      inside = (
        slice(max(down, 0), 9 + min(down, 0)),
        slice(max(right, 0), 9 + min(right, 0)),
      )
      np.testing.assert_array_equal(found[inside], moved[inside])
      np.testing.assert_array_equal(views.see(image, view), found)
  down = views.see(images, views.View(down=2))
  np.testing.assert_array_equal(down[:, 0], images[:, 0])
  np.testing.assert_array_equal(down[:, 1], images[:, 0])
  right = views.see(images, views.View(right=-2))
  np.testing.assert_array_equal(right[:, :, -1], images[:, :, -1])
