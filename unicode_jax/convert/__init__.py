"""From and to the PyTorch world: Hugging Face folders and GGUF files.

`architectures` says which of their configs is which `LlamaConfig`, `names`
which of their tensors is which parameter, `readers` opens their files, and
`importing` makes a run folder of one. `python -m unicode_jax.convert` is the
command.
"""
