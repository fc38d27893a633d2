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
  5  stages, convert, evaluation
  6  main and the other commands

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
