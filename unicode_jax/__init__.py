"""UniCode in JAX: one codebook for words and images.

An open implementation of "UniCode: Learning a Unified Codebook for Multimodal
Large Language Models" (ECCV 2024, arXiv 2403.09072). A visual tokenizer
quantizes images with the token table of a LLaMA-family language model, so a
code id is a token id: no rows are added to the vocabulary, no projector sits
between image and model, and the model's own head predicts images.

Every module imports only from lower floors:

  0  config, sharding
  1  kernels, nn
  2  codebook, quantizer
  3  models
  4  data, training, sampling
  5  loading
  6  inference, encoding
  7  stages, convert, evaluation
  8  main and the other commands

Local arrays carry their shape in their name (`x_BTE`):

  B  batch                    E  width of the language model (d_llm)
  T  length, in tokens        H  attention heads
  D  depth, codes a position  G  key/value heads
  K  codes, the vocabulary    F  width of the MLP
  N  flattened positions      A  size of a head
  C  code_dim                 R  query heads per key/value head
  X, Y  sides of a grid       S  keys, or slots of a cache
"""

__version__ = "0.1.0"


def __getattr__(name):
  """Gives `unicode_jax.load` without importing JAX before it is asked for."""
  if name == "load":
    from unicode_jax.inference import load  # pylint: disable=g-import-not-at-top

    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
