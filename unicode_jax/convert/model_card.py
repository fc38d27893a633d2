"""Writes the model card of an exported checkpoint: README.md.

What the model is, how it is used, what it was trained on and how it did. The
numbers are those that `evaluate` left in the run folder for the same step; they
travel along as a report with its pictures.
"""

import logging
import pathlib
import shutil

from unicode_jax import config as config_lib, loading

_EVALUATION = "evaluation"
# Embedded data: what it is, and whose.
_EMBEDDED = {
  "openmoji": "pictures of [OpenMoji](https://openmoji.org) 17, CC BY-SA 4.0",
  "easy_vqa": "pictures and questions of easy-VQA 1.0, MIT",
}
_CONVERSATIONS = "conversations of ChatterBot's corpus 1.3, BSD"
# Headline -> suite, path in the results of each set, format.
_HEADLINES = {
  "PSNR of reconstructions": ("reconstruction", ("psnr",), "{:.2f} dB"),
  "Questions answered": ("vqa", ("accuracy",), "{:.1%}"),
  "- by who knows only the questions": (
    *("vqa", ("blind", "accuracy"), "{:.1%}"),
  ),
  "POPE-style F1, adversarial": ("pope", ("adversarial", "f1"), "{:.3f}"),
  "Captions exactly right": ("caption", ("exact_match",), "{:.1%}"),
  "Perplexity of text": ("text", ("perplexity",), "{:.1f}"),
}
_USE_LLM = """\
Text in, text out, with nothing but transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = tokenizer.apply_chat_template(
  [{"role": "user", "content": "hello"}],
  add_generation_prompt=True,
  return_tensors="pt",
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```
"""
_USE_VISUAL = """\
Pictures too, with the `modeling_unicode.py` in this folder, which is plain
PyTorch (read it before you trust it):

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(
  path, trust_remote_code=True
)

codes = model.encode(processor.to_pixels([Image.open("x.png")]))  # [1, P, D]
pictures = processor.to_images(model.decode(codes))
```
"""
_USE_LEARNED = """\
```python
inputs = processor("what is in the image?", images=Image.open("x.png"))
print(processor.decode(model.generate(**inputs)))

inputs = processor.drawing(["rooster", "a blue circle"])
# draw also takes guidance, temperature, top_k, top_p and a torch.Generator.
for i, picture in enumerate(processor.to_images(model.draw(**inputs))):
  picture.save(f"drawn_{i}.png")
```
"""


def write(
  folder: pathlib.Path,
  llm: loading.LoadedLlm,
  visual: dict | None,
  licence: str | None,
) -> None:
  """Writes README.md, and copies the evaluation if there is one.

  Args:
    folder: the exported checkpoint's.
    llm: its language model.
    visual: `visual.settings`, None for a language model alone.
    licence: of the weights, as model hubs spell it; None if it is not chosen.
  """
  config = llm.config
  name = llm.workdir.resolve().name if llm.workdir else folder.name
  lines = [
    "---",
    f"license: {licence or 'other'}",
    "library_name: transformers",
    *(["tags: [unicode, unified-codebook]"] if visual else ()),
    "---",
    "",
    f"# {name}",
    "",
    *_description(llm, visual),
    "## Use",
    "",
    "`path` is this folder.",
    "",
    _USE_LLM,
  ]
  if visual:
    lines.append(_USE_VISUAL)
    if config.stage == "instruct":
      lines.append(_USE_LEARNED)
  lines += ["## Training", "", *_training(config, llm.step)]
  lines += ["## Evaluation", "", *_evaluation(folder, llm, visual)]
  lines += ["## Licence", "", _licence(config, licence), ""]
  (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _description(llm: loading.LoadedLlm, visual: dict | None) -> list[str]:
  shape, config = llm.llama, llm.config
  model = (
    f"A language model of {shape.num_layers} layers, {shape.embed_dim} wide, "
    f"with {shape.vocab_size} tokens."
  )
  if visual is None:
    lines = [model, ""]
    if config.stage == "instruct":
      lines += [
        "It was trained to read features of pictures through a projector "
        "(`instruct.vision=projector`), which is not in this folder.",
        "",
      ]
    return lines
  learned = config.stage == "instruct"
  size, (height, width) = visual["image_size"], visual["grid"]
  lines = [
    f"{model} Its token table is also the codebook of a visual tokenizer "
    "(UniCode, [arXiv 2403.09072](https://arxiv.org/abs/2403.09072))"
    + (
      ": it reads and draws pictures as it does words."
      if learned
      else ". It has not learned to read or to draw pictures yet: that is what "
      "stage II is for."
    ),
    "",
    f"A picture of {size}x{size} pixels has {height}x{width} positions with "
    f"{visual['depth']} codes each ({visual['quantizer']}, "
    f"{visual['code_dim']} dimensions).",
    "",
  ]
  if config.tokenizer.dtype != "float32":
    lines += [
      f"The visual tokenizer was trained in {config.tokenizer.dtype}; here it "
      "computes in float32, and chooses another code now and then.",
      "",
    ]
  return lines


def _training(config, step: int) -> list[str]:
  if config.stage == loading.LLM_STAGE:
    return ["Imported as it was; not trained further.", ""]
  data = config.data
  lines = [
    f"- stage: {config.stage}, {step} steps, seed {config.seed}",
    f"- paradigm of the codebook: {config.codebook.paradigm}",
  ]
  for key in ("init_from", "llm_from"):
    if config[key] is not None:
      start = pathlib.Path(config[key])
      shown = "/".join(start.parts[-2:])  # No path of somebody's machine.
      lines.append(f"- started from (`{key}`): {shown}")
  if config.instruct.lora_rank and config.stage == "instruct":
    lines.append(f"- adapters of rank {config.instruct.lora_rank}, merged")
  if data.source == "embedded":
    lines += [f"- data: {_EMBEDDED[name]}" for name in data.embedded]
    lines += [f"- data: {_CONVERSATIONS}"]
  else:
    lines += [f"- data: source {data.source!r}, {data.path or data.tfds}"]
  return [
    *lines,
    "",
    "`unicode_jax_config.json` has every setting, of "
    "`python -m unicode_jax.main`.",
    "",
  ]


def _evaluation(
  folder: pathlib.Path, llm: loading.LoadedLlm, visual: dict | None
) -> list[str]:
  """Copies the run's evaluation; returns its headlines."""
  there = llm.workdir / _EVALUATION if llm.workdir else None
  command = "`python -m unicode_jax.evaluate` before exporting"
  if there is None or not (there / "results.json").is_file():
    return [f"Not evaluated: run {command}.", ""]
  file = there / "results.json"
  try:
    results = config_lib.parse_json(file.read_text(encoding="utf-8"))
    step = results.get("run", {}).get("step")
    suites = {
      name: dict(entry.get("results") or {})
      for name, entry in results["suites"].items()
    }
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise config_lib.ConfigError(
      f"{file} cannot be read ({error!r:.99}): evaluate the run again, or move "
      "the file away"
    ) from None
  if step != llm.step:
    logging.warning(
      "the evaluation in %s is of step %s, not of %d: left out",
      *(there, step, llm.step),
    )
    return [f"Not evaluated at this step, {llm.step}: run {command}.", ""]
  # Not what links lead to: an export is published.
  shutil.copytree(there, folder / _EVALUATION, ignore=_links)
  lines = ["Held-out data, one seed:", "", "| | on | |", "|---|---|---|"]
  for title, (suite, path, form) in _HEADLINES.items():
    if visual is None and suite != "text":
      continue  # Of what this folder leaves out.
    entry = suites.get(suite, {})
    for name, value in entry.items():
      for key in path:
        value = value.get(key, {}) if isinstance(value, dict) else None
      if isinstance(value, int | float):
        lines.append(f"| {title} | {name} | {form.format(value)} |")
  return [
    *lines,
    "",
    f"All of it, with protocols and pictures: [{_EVALUATION}/report.md]"
    f"({_EVALUATION}/report.md).",
    "",
  ]


def _links(folder: str, names: list[str]) -> list[str]:
  """Returns which names in a folder are links."""
  return [n for n in names if (pathlib.Path(folder) / n).is_symlink()]


def _licence(config, licence: str | None) -> str:
  if licence:
    return f"The weights: {licence}."
  of_data = config.stage != loading.LLM_STAGE
  return "The licence of the weights is for their owner to choose" + (
    ", who heeds those of the data above and of the model that it started from."
    if of_data
    else "."
  )
