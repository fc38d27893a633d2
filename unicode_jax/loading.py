"""From a config or a run folder to a model: the one loader.

`build_model` makes the architecture that a config describes, for every stage.
`load` reads a run's newest checkpoint, of stage I or II, with all that is
needed to use it: the commands and `unicode_jax.load` start here.
Nothing is trained here, and optimizer states are not read.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from absl import logging
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import (
  codebook as codebook_lib,
  config as config_lib,
  sharding,
)
from unicode_jax.data import sequences, text_tokenizer as text_tokenizer_lib
from unicode_jax.models import (
  llama as llama_lib,
  lora as lora_lib,
  tokenizer as tokenizer_lib,
  unicode as unicode_lib,
)
from unicode_jax.nn import rope
from unicode_jax.training import checkpoint

TEXT_TOKENIZER = "text_tokenizer"
LLM_STAGE = config_lib.LLM_STAGE


def build_llama(config) -> llama_lib.LlamaConfig | None:
  """Makes the LLM's shape, None for a stage without one."""
  if config.stage == "tokenizer":
    return None
  settings = dict(config.llm)
  scaling = rope.RopeScaling(**settings.pop("rope_scaling"))
  del settings["context_length"]  # Changes nothing that the model computes.
  separate = config.stage == "instruct" and config.instruct.vision == "separate"
  return llama_lib.LlamaConfig(
    vocab_size=config.text.vocab_size * (2 if separate else 1),
    rope_scaling=None if scaling.factor == 1.0 else scaling,
    **settings,
  )


def build_model(config) -> unicode_lib.UniCode:
  """Makes the architecture that a config describes.

  Args:
    config: Resolved ConfigDict of any stage. In stage II the tokenizer is
      frozen, whatever paradigm trained it.

  Returns:
    The model.
  """
  tokenizer, codebook = config.tokenizer, config.codebook
  rules = codebook_lib.CodebookConfig(depth=tokenizer.depth, **_rules(codebook))
  vision, lora = "unified", {}
  if config.stage == "instruct":
    rules, vision = codebook_lib.frozen_config(rules), config.instruct.vision
    lora = {key: config.instruct[key] for key in ("lora_rank", "lora_alpha")}
  return unicode_lib.UniCode(
    tokenizer=tokenizer_lib.TokenizerConfig(
      image_size=config.image_size,
      code_dim=codebook.code_dim,
      channels=tokenizer.channels,
      channel_multipliers=tuple(tokenizer.channel_multipliers),
      num_res_blocks=tokenizer.num_res_blocks,
      stem_patch=tokenizer.stem_patch,
      attention=tokenizer.attention,
      dtype=tokenizer.dtype,
    ),
    codebook=rules,
    quantizer=tokenizer.quantizer,
    llama=build_llama(config),
    vision=vision,
    **lora,
  )


def _rules(codebook) -> dict[str, Any]:
  """Takes the section apart; `sync_every` is the schedule's."""
  return {k: v for k, v in codebook.items() if k != "sync_every"}


def sequence_format(config) -> sequences.SequenceFormat:
  """Returns how a config turns conversations into ids.

  Args:
    config: Resolved ConfigDict of a stage with an LLM.
  """
  stage_two = config.stage == "instruct"
  template = config.instruct.template if stage_two else "plain"
  separate = stage_two and config.instruct.vision == "separate"
  return sequences.SequenceFormat(
    template=sequences.TEMPLATES[template],
    image_start=config.text.image_start,
    image_end=config.text.image_end,
    depth=config.tokenizer.depth,
    codes_shift=config.text.vocab_size if separate else 0,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A trained model.

  Attributes:
    config: Resolved ConfigDict of the run.
    model: Architecture.
    variables: Parameters, codebook and valid ids.
    text_tokenizer: None for a visual tokenizer alone.
    workdir: Run folder.
    step: Steps that were trained.
  """

  config: Any
  model: unicode_lib.UniCode
  variables: unicode_lib.Variables
  text_tokenizer: text_tokenizer_lib.TextTokenizer | None
  workdir: pathlib.Path
  step: int

  @property
  def layout(self) -> sequences.SequenceFormat:
    """How conversations become ids."""
    return sequence_format(self.config)

  @property
  def llm(self) -> "LoadedLlm":
    """The language model by itself."""
    return LoadedLlm(
      self.config,
      self.model.llama,
      self.variables.params["llm"],
      self.text_tokenizer,
      self.workdir,
      self.step,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedLlm:
  """A language model by itself: of a run, or imported.

  Attributes:
    config: Resolved ConfigDict of the run.
    llama: Its shape.
    params: Of `Llama`.
    text_tokenizer: Its own.
    workdir: Run folder.
    step: Steps that were trained.
  """

  config: Any
  llama: llama_lib.LlamaConfig
  params: Any
  text_tokenizer: text_tokenizer_lib.TextTokenizer
  workdir: pathlib.Path
  step: int


def load(
  workdir: str | os.PathLike[str],
  step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Loaded:
  """Loads a run: of stage I, stage II or a tokenizer alone.

  Adapters are merged: what is returned has none.

  Args:
    workdir: Run folder.
    step: Which checkpoint; None for the newest.
    mesh: Where to: each device reads its share (`sharding.state_shardings`).
      None for the first device.

  Returns:
    The model.

  Raises:
    ConfigError: If the folder holds no run, or no such checkpoint.
  """
  workdir, config = _find(workdir)
  if config.stage == LLM_STAGE:
    raise config_lib.ConfigError(
      f"{workdir} holds an imported language model, which has seen no image: "
      f"train stage I from it with --config.llm_from={workdir}"
    )
  model = build_model(config)
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((config.text.vocab_size,), jnp.bool_),
  )
  step, variables = _restore(workdir, config, step, shapes, mesh)
  if model.lora_rank:
    params = dict(variables.params)
    params["llm"] = lora_lib.merge_in_place(
      params["llm"], params.pop("lora"), model.lora_alpha / model.lora_rank
    )
    variables = variables.replace(params=params)
    model = dataclasses.replace(model, lora_rank=0)
  tokenizer = None
  if model.llama is not None:
    tokenizer = _load_text_tokenizer(workdir, step)
  return Loaded(config, model, variables, tokenizer, workdir, step)


def at_image_size(loaded: Loaded, image_size: int) -> Loaded:
  """Returns the same model for images of another size.

  Encoder and decoder are convolutions, and the LLM reads however many positions
  there are; none of them was trained on this number, so expect worse than at
  the run's own size (METHOD section 5).

  Args:
    loaded: The run.
    image_size: S, pixels; a multiple of the tokenizer's downsampling.

  Raises:
    ConfigError: If the grid of the tokenizer cannot have this size.
  """
  asked = config_lib.apply_overrides(loaded.config, {"image_size": image_size})
  config = config_lib.check_model(asked)
  tokenizer = dataclasses.replace(loaded.model.tokenizer, image_size=image_size)
  model = dataclasses.replace(loaded.model, tokenizer=tokenizer)
  return dataclasses.replace(loaded, config=config, model=model)


def load_llm(
  workdir: str | os.PathLike[str],
  step: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> LoadedLlm:
  """Loads the language model of a run, or one that was imported.

  Args:
    workdir: Run folder, of a stage with an LLM.
    step: Which checkpoint; None for the newest.
    mesh: As in `load`.

  Returns:
    The model; nothing else of the run is read, unless adapters are merged.

  Raises:
    ConfigError: If the folder holds no run, no LLM, or no such checkpoint.
  """
  workdir, config = _find(workdir)
  if config.stage == "instruct" and config.instruct.lora_rank:
    return load(workdir, step, mesh).llm
  llama = build_llama(config)
  if llama is None:
    raise config_lib.ConfigError(
      f"{workdir} holds a visual tokenizer alone, without a language model: "
      "name a run of stage I or II"
    )
  params = jax.eval_shape(
    llama_lib.Llama(llama).init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 1, 1), jnp.int32),
  )["params"]
  shapes = {"params": {"llm": params}}
  step, variables = _restore(workdir, config, step, shapes, mesh)
  params = variables["params"]["llm"]
  tokenizer = _load_text_tokenizer(workdir, step)
  return LoadedLlm(config, llama, params, tokenizer, workdir, step)


def _find(workdir):
  """Returns folder and config of a run."""
  config = config_lib.read_run(workdir)
  return pathlib.Path(os.path.expanduser(workdir)), config


def _restore(workdir: pathlib.Path, config, step: int | None, shapes, mesh):
  """Reads those variables of a checkpoint that `shapes` has.

  Returns:
    Step and variables: of the step that is asked for, else of the newest
    checkpoint that is whole.
  """
  folder = workdir / "checkpoints"
  steps = sorted(
    (
      int(entry.name)
      for entry in (folder.iterdir() if folder.is_dir() else ())
      if entry.name.isdigit()
    ),
    reverse=True,
  )
  if not steps or (step is not None and step not in steps):
    raise config_lib.ConfigError(
      f"{folder} has no checkpoint"
      + (f" of step {step}; it has {steps[::-1]}" if steps else "")
      + (": choose one of these" if steps else ": let the run reach its first")
    )
  if mesh is None:
    places = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  else:
    places = sharding.state_shardings(shapes, mesh)
  target = sharding.placed_shapes(shapes, places)
  problems = []
  for tried in steps if step is None else [step]:
    try:
      variables = checkpoint.read_variables(folder / str(tried), config, target)
    except checkpoint.DamagedError as error:
      problems.append(f"step {tried}: {error}")
      continue
    if problems:
      logging.warning(
        "%s: step %d is used, newer checkpoints are damaged (%s)",
        folder,
        tried,
        "; ".join(problems),
      )
    trained = config.stage != LLM_STAGE
    if trained and step is None and tried < config_lib.total_steps(config):
      logging.warning(
        "%s: trained for %d of %d steps",
        workdir,
        tried,
        config_lib.total_steps(config),
      )
    return tried, variables
  raise config_lib.ConfigError(
    f"no checkpoint in {folder} can be read ({'; '.join(problems)}): bring one "
    "back from a copy"
    + ("" if step is None else f", or choose another of {steps[::-1]}")
  )


def _load_text_tokenizer(workdir: pathlib.Path, step: int):
  """Reads the text tokenizer that a checkpoint was trained with."""
  folder = workdir / TEXT_TOKENIZER
  tokenizer = text_tokenizer_lib.load_text_tokenizer(folder)
  record = checkpoint.read_record(workdir / "checkpoints" / str(step))
  if record.get("text_tokenizer") not in (None, tokenizer.digest):
    raise config_lib.ConfigError(
      f"{folder} is not the tokenizer that the run was trained with: it was "
      "edited or is damaged; the same training command writes it anew"
    )
  return tokenizer


def frozen_codebook(
  model: unicode_lib.UniCode, variables: unicode_lib.Variables
):
  """Fixes a codebook as it is, for stage II (H3).

  Args:
    model: Its architecture; the codebook is not private.
    variables: Its variables, on any devices.

  Returns:
    Parameters and state of `codebook.freeze`, on the first device: what is
    computed of a split table would depend on how it is split.
  """
  given = (
    variables.params["codebook"],
    variables.codebook_state,
    model.embedding(variables.params),
    variables.valid,
  )
  given = jax.device_put(sharding.gather(given), jax.local_devices()[0])
  return codebook_lib.freeze(*given, model.codebook)


def fingerprint(
  model: unicode_lib.UniCode, variables: unicode_lib.Variables
) -> str:
  """Hashes all that decides which codes an image has (H12).

  Stage II, which fixes the table of its start, has its start's fingerprint.
  The LLM, the decoder and a baseline's own parameters do not count, nor how
  the model is split over devices. The hardware does where the table is computed
  (`projected`, before stage II fixes it).

  Args:
    model: The architecture.
    variables: With the encoder and the codebook.

  Returns:
    64 hexadecimal digits.
  """
  facts = {
    "format": 1,  # Raise it when the same variables give other codes.
    "quantizer": model.quantizer,
    "depth": model.depth,
    "l2_normalize": model.codebook.l2_normalize,
    "tokenizer": dataclasses.asdict(model.tokenizer),
  }
  # As it is stored, before `l2_normalize`, whose rounding is the device's.
  if model.codebook.paradigm == "private":
    table = variables.params["codebook"]["table"]
  else:
    table = frozen_codebook(model, variables)[1]["table"]
  arrays = {
    "encoder": variables.params["encoder"],
    "gain": variables.codebook_state["gain"],
    "table": table,
    "valid": variables.valid,
  }
  digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
  for path, leaf in sorted(traverse_util.flatten_dict(arrays, sep="/").items()):
    value = np.asarray(sharding.gather(leaf))
    digest.update(f"{path} {value.dtype.name} {value.shape}".encode())
    digest.update(value.tobytes())
  return digest.hexdigest()


def valid_codes(config, tokenizer) -> np.ndarray:
  """Returns bool[K], the ids that may be visual codes (H9).

  Args:
    config: Resolved ConfigDict.
    tokenizer: The text tokenizer, None for a private codebook.
  """
  text = config.text
  if tokenizer is None:
    return np.ones(text.vocab_size, bool)
  return tokenizer.visual_code_mask(
    text.image_start, text.image_end, text.vocab_size
  )
