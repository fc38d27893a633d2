"""Where images and texts come from, and which of them are never trained on.

`embedded` reads installed packages, `folder` anyone's images, `llava` the JSON
of LLaVA's data sets with their images, `tfds` what TensorFlow Datasets has
prepared, `arrayrecord` what `unicode_jax.prepare` has. Each gives training and
held-out `ImageSource`s with `Annotation`s (`source`), decoded by `images`, and
so serves METHOD sections 2 to 4. Sources know nothing of batches, of tokens or
of the template.
"""

from unicode_jax.data.sources.arrayrecord import load_arrayrecord
from unicode_jax.data.sources.embedded import (
  easy_vqa_questions,
  has_chatterbot,
  load_chatterbot,
  load_easy_vqa,
  load_openmoji,
  shape_and_colour,
)
from unicode_jax.data.sources.folder import (
  CAPTION_QUESTION,
  caption_conversations,
  load_folder,
)
from unicode_jax.data.sources.images import (
  IMAGE_SUFFIXES,
  decode_image,
  stored_size,
)
from unicode_jax.data.sources.llava import load_llava
from unicode_jax.data.sources.source import (
  MAX_HELDOUT,
  Annotation,
  ImageSource,
  bare_words,
  is_heldout,
  partition,
  untoned_name,
  validation,
)
from unicode_jax.data.sources.tfds import load_tfds

__all__ = [
  "CAPTION_QUESTION",
  "IMAGE_SUFFIXES",
  "MAX_HELDOUT",
  "Annotation",
  "ImageSource",
  "bare_words",
  "caption_conversations",
  "decode_image",
  "easy_vqa_questions",
  "has_chatterbot",
  "is_heldout",
  "load_arrayrecord",
  "load_chatterbot",
  "load_easy_vqa",
  "load_folder",
  "load_llava",
  "load_openmoji",
  "load_tfds",
  "partition",
  "shape_and_colour",
  "stored_size",
  "untoned_name",
  "validation",
]
