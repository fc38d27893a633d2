"""Stage II: the LLM learns to read and to draw images; the tokenizer is frozen.

METHOD section 4. It starts from a run of stage I (`init_from`), or goes on from
one of stage II, and trains the LLM on a weighted mixture of tasks
(`data.tasks`), with the loss on answers only. Ids keep the meaning that stage I
gave them: the table that quantizes images is fixed as it was (H3), while the
LLM's own rows go on moving. The two baselines of METHOD section 5 are settings
of the same code (`instruct.vision`).
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import (
  config as config_lib,
  data as data_lib,
  encoding,
  loading,
  sharding,
)
from unicode_jax.data import (
  code_cache,
  mixture as mixture_lib,
  tasks,
  views as views_lib,
)
from unicode_jax.models import (
  llama as llama_lib,
  lora as lora_lib,
  unicode as unicode_lib,
)
from unicode_jax.stages import run_folder, runner
from unicode_jax.training import (
  alarm as alarm_lib,
  instruct_step,
  optimizer as optimizer_lib,
  phase as phase_lib,
  state as state_lib,
)

# Rows of each held-out group that an evaluation before the last takes.
EVALUATED_ROWS = 64
_CODES = "codes"  # Of `data.codes="auto"`, in the run folder.

CURVES = {
  "Loss": ("loss",),
  "Text loss by task": ("text_loss/",),
  "Image loss by task": ("image_loss/",),
  "Held-out loss": ("eval/text_loss/", "eval/image_loss/"),
  "Held-out accuracy by token": (
    "eval/text_accuracy/",
    "eval/image_accuracy/",
  ),
  "Held-out answers": ("eval/exact/",),
  "Held-out text perplexity": ("eval/text_perplexity",),
}


def mixture_config(
  config, source_weights: Sequence[float]
) -> mixture_lib.MixtureConfig:
  """Returns what decides the rows of a run.

  Args:
    config: Resolved ConfigDict.
    source_weights: Share of each image source.

  Raises:
    ConfigError: If only tasks have a share that a baseline cannot do.
  """
  settings = config.instruct
  weights = {
    name: share
    for name, share in settings.tasks.items()
    if settings.vision != "projector" or name not in tasks.DRAWING
  }
  if not any(weights.values()):
    raise config_lib.ConfigError(
      f"instruct.vision={settings.vision!r} cannot draw, but no other task has "
      "a share in instruct.tasks: give caption, vqa or text one"
    )
  return mixture_lib.MixtureConfig(
    weights=weights,
    source_weights=tuple(source_weights),
    # Slots are shifted when they are filled.
    layout=dataclasses.replace(loading.sequence_format(config), codes_shift=0),
    sequence_length=config.text.sequence_length,
    positions=config_lib.positions(config),
    first_slot=loading.build_llama(config).vocab_size,
    segments=settings.segments,
    questions_per_image=settings.questions_per_image,
    yes_no_ratio=settings.yes_no_ratio,
    condition_dropout=settings.condition_dropout,
    views=views_lib.views(config.data.flip, config.data.shift),
  )


def starting_variables(config, loaded: loading.Loaded, model):
  """Freezes the tokenizer of a run to start from.

  Args:
    config: Resolved ConfigDict of stage II.
    loaded: The run that it starts from.
    model: Architecture of stage II.

  Returns:
    Variables of stage II, as far as the run has them.

  Raises:
    ConfigError: If it is a run of stage II with another baseline's model, or
      one whose tokenizer was never trained.
  """
  params = dict(loaded.variables.params)
  params["llm"] = llama_lib.with_layers_as(
    params["llm"], model.llama.scan_layers
  )
  variables = loaded.variables.replace(params=params)
  if loaded.config.stage == "instruct":
    if loaded.model.vision != model.vision:
      raise config_lib.ConfigError(
        f"init_from={config.init_from!r} was trained with instruct.vision="
        f"{loaded.model.vision!r}, not {model.vision!r}: start from stage I"
      )
    template = loaded.config.instruct.template
    if template != config.instruct.template:
      logging.warning(
        "init_from=%r was trained with instruct.template=%r, this run uses %r",
        config.init_from,
        template,
        config.instruct.template,
      )
    return variables
  encoding.check_trained(variables)
  params["codebook"], codebook_state = loading.frozen_codebook(
    loaded.model, loaded.variables
  )
  return variables.replace(params=params, codebook_state=codebook_state)


def extend(
  model: unicode_lib.UniCode, key: jax.Array, variables: unicode_lib.Variables
) -> unicode_lib.Variables:
  """Adds what a baseline has and its start has not.

  Args:
    model: Architecture of stage II.
    key: PRNG key.
    variables: Of the start.

  Returns:
    Variables of `model`: "separate" gets K new rows, drawn as the others were,
    "projector" its projector; those of a start that has them stay. Adapters
    are new, and change nothing yet.
  """
  params = dict(variables.params)
  fresh = jax.eval_shape(model.init, key, variables.valid).params
  if model.vision == "projector" and "projector" not in params:
    params["projector"] = model.init(key, variables.valid).params["projector"]
  llm = dict(params["llm"])
  keys = jax.random.split(key)
  rows = fresh["llm"]["embed_tokens"]["embedding"].shape[0]
  table = llm["embed_tokens"]["embedding"]
  if rows > table.shape[0]:
    shape = rows - table.shape[0], table.shape[1]
    new = model.llama.embedding_std * jax.random.normal(keys[0], shape)
    llm["embed_tokens"] = {"embedding": jnp.concatenate([table, new])}
    if "lm_head" in llm:
      new = 0.02 * jax.random.normal(keys[1], shape[::-1])
      kernel = llm["lm_head"]["kernel"]
      llm["lm_head"] = {"kernel": jnp.concatenate([kernel, new], axis=1)}
  params["llm"] = llm
  if model.lora_rank:
    params["lora"] = lora_lib.init_adapters(
      jax.random.fold_in(key, 1), llm, model.lora_rank
    )
  return variables.replace(params=params)


def make_optimizer(config):
  """Makes the optimizer of a run."""
  settings = optimizer_lib.OptimizerConfig(**config.optimizer["instruct"])
  return optimizer_lib.make_optimizer(settings, config.num_steps)


def make_phase(config, model: unicode_lib.UniCode, num_groups: int):
  """Makes the only kind of step.

  Args:
    config: Resolved ConfigDict.
    model: Architecture of stage II.
    num_groups: Groups of the mixture.
  """
  instruct = config.instruct
  return phase_lib.Phase(
    name="instruct",
    stream="mixture",
    step=instruct_step.make_instruct_step(
      model,
      make_optimizer(config),
      num_groups=num_groups,
      image_loss_weight=instruct.image_loss_weight,
      microbatches=config.microbatches,
    ),
    items=instruct.global_batch_size * config.text.sequence_length,
    unit="tokens",
  )


def initial_state(
  config,
  model: unicode_lib.UniCode,
  key: jax.Array,
  variables: unicode_lib.Variables,
) -> state_lib.TrainState:
  """Puts the variables of a start into a training state.

  Args:
    config: Resolved ConfigDict.
    model: Architecture of stage II.
    key: PRNG key.
    variables: Of the start.
  """
  model_key, run_key = jax.random.split(key)
  variables = extend(model, model_key, variables)
  groups = {
    name: variables.params[name] for name in instruct_step.trained_groups(model)
  }
  return state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    rng=jax.random.key_data(run_key),
    variables=variables,
    discriminator={},
    opt_state={"instruct": make_optimizer(config).init(groups)},
  )


class InstructStage:
  """The mixture of tasks at every step."""

  def __init__(
    self,
    config,
    data: data_lib.Data,
    loaded: loading.Loaded,
    codes: Sequence[mixture_lib.Codes] | None = None,
  ):
    """Prepares the mixture and the step.

    Args:
      config: Resolved ConfigDict.
      data: Images and texts.
      loaded: The run to start from.
      codes: Cached codes of each image source, None to encode at every step.

    Raises:
      ConfigError: If the data has nothing for the mixture, or the start does
        not fit (`starting_variables`).
    """
    self.config, self.data = config, data
    self.model = loading.build_model(config)
    self._start = starting_variables(config, loaded, self.model)
    self.valid = np.asarray(sharding.gather(loaded.variables.valid))
    self.total_steps = config.num_steps
    self.alarm_config = alarm_lib.AlarmConfig(**config.alarm)
    rows = mixture_config(config, data.image_weights)
    self.mixture = mixture_lib.Mixture(
      data.image_sources,
      data.train_texts,
      data.text_tokenizer,
      rows,
      codes,
    )
    self.heldout = mixture_lib.Mixture(
      data.heldout_sources,
      data.heldout_texts,
      data.text_tokenizer,
      dataclasses.replace(
        rows,
        # Whether language is kept is asked of every mixture (H10).
        # Descriptions are few, so that held-out ones are not unseen.
        weights={**rows.weights, "described": 0.0, "text": 1.0},
        # As the published tests ask.
        questions_per_image=1,
        yes_no_ratio=0.0,
        views=(views_lib.AS_IS,),
      ),
    )
    self._phase = make_phase(config, self.model, len(self.mixture.groups))

  def start(self, mesh: jax.sharding.Mesh):
    """Hands over the variables to start from, which it then forgets.

    A model is too large to be held beside its training for no use.
    """
    start, self._start = self._start, None
    if start is None:
      raise RuntimeError("a stage starts once: make another")
    return sharding.put_state(start, mesh)

  def init(self, key: jax.Array, start) -> state_lib.TrainState:
    """Puts the start into a training state."""
    return initial_state(self.config, self.model, key, start)

  def make_iterators(self, start, share):
    """Opens the stream of packed rows."""
    return {
      "mixture": mixture_lib.mixture_iterator(
        self.mixture,
        global_batch_size=self.config.instruct.global_batch_size,
        seed=self.config.seed,
        process_index=share[0],
        process_count=share[1],
        num_workers=self.config.data.num_workers,
        start=start["mixture"],
      )
    }

  def batch_names(self, stream: str, batch: int) -> list[str]:
    """Names the rows of a batch, with their images."""
    del stream
    return mixture_lib.batch_names(
      self.mixture,
      global_batch_size=self.config.instruct.global_batch_size,
      seed=self.config.seed,
      batch=batch,
    )

  def phase(self, step: int) -> phase_lib.Phase:
    """Returns the only kind of step."""
    del step
    return self._phase

  def transition(self, step: int) -> phase_lib.Transition | None:
    """Returns None: the codebook is frozen."""
    del step
    return None

  def summarize(self, state, window, batch) -> dict[str, float]:
    """Tells losses apart by task, and text from images (H10)."""
    del state, batch
    sums = window.pop("sums", None)
    values = {name: float(value) for name, value in window.items()}
    if sums is not None:
      values |= _by_task(self.mixture, sums)
    return values

  def growing_energy(self, metrics) -> str | None:
    """Returns None: nothing is quantized anew."""
    del metrics
    return None

  def likely_cause(self, metrics) -> str:
    """Returns nothing: a frozen codebook does not collapse."""
    del metrics
    return ""

  @functools.partial(jax.jit, static_argnums=0)
  def _measure(self, variables, batch):
    groups = {
      name: variables.params[name]
      for name in instruct_step.trained_groups(self.model)
    }
    batch = sharding.constrain_batch(batch)
    _, aux = instruct_step.instruct_loss(self.model, groups, variables, batch)
    sums = instruct_step.loss_sums(batch, aux, len(self.heldout.groups))
    return sharding.replicate((sums, aux["hits"]))

  def evaluate(self, state, *, final: bool) -> dict[str, float]:
    """Measures held-out rows of every task, the right answers before given.

    "exact" is the share of conversations of which every answer's every token
    was the likeliest; held-out questions are asked one a conversation.
    """
    total = np.zeros((len(self.heldout.groups), 2, 3))
    result, most = {}, self.config.instruct.heldout_rows
    for number, group in enumerate(self.heldout.groups):
      right = answers = 0
      for batch in mixture_lib.fixed_batches(
        self.heldout,
        number,
        self.config.instruct.global_batch_size,
        most if final else min(most, EVALUATED_ROWS),
      ):
        sums, hits = jax.device_get(self._measure(state.variables, batch))
        total += sums
        counted = instruct_step.exact_answers(batch, hits)
        right, answers = right + counted.sum(), answers + len(counted)
      if group.name in ("vqa", "caption", "text"):
        result[f"eval/exact/{group_name(group)}"] = right / max(answers, 1)
    measured = _by_task(self.heldout, total)
    result |= {f"eval/{name}": value for name, value in measured.items()}
    if "text_loss/text" in measured:
      result["eval/text_perplexity"] = float(np.exp(measured["text_loss/text"]))
    return result

  def pictures(self, state):
    """Returns no pictures: the evaluation of the finished run draws."""
    del state
    return {}

  def headline(self, metrics) -> str:
    """Says the metrics in a few words."""
    words = {"loss": "loss"} | {
      name.partition("/")[2]: name
      for name in metrics
      if name.startswith(("text_loss/", "image_loss/")) and name.count("/") == 1
    }
    return "  ".join(
      f"{word} {metrics[name]:.3g}"
      for word, name in words.items()
      if name in metrics
    )


def group_name(group: mixture_lib.TaskRows) -> str:
  """Returns "task" or "task/source"."""
  return f"{group.name}/{group.source.name}" if group.source else group.name


def _by_task(mixture, sums) -> dict[str, float]:
  """Returns losses and accuracies of groups and, over sources, of tasks."""
  by_name = collections.defaultdict(lambda: np.zeros((2, 3)))
  for group, values in zip(mixture.groups, np.asarray(sums), strict=True):
    by_name[group.name] += values
    if group.source is not None:
      by_name[group_name(group)] += values
  result = {}
  for name, values in by_name.items():
    for kind, (nats, hits, tokens) in zip(("text", "image"), values):
      # Delimiters and ends make a drawing's text; they say nothing.
      drawing = name.split("/")[0] in tasks.DRAWING
      if tokens and (kind == "image") == drawing:
        result[f"{kind}_loss/{name}"] = float(nats / tokens)
        result[f"{kind}_accuracy/{name}"] = float(hits / tokens)
  return result


def run(config, workdir: pathlib.Path) -> None:
  """Runs the stage.

  Args:
    config: Validated ConfigDict with `stage="instruct"`.
    workdir: Run folder; a run that is there is resumed.
  """
  with runner.prepared(config, workdir) as mesh:
    loaded = loading.load(config.init_from, mesh=mesh)
    data = runner.load_data(
      config,
      with_text=True,
      tokenizer_path=str(loaded.workdir / loading.TEXT_TOKENIZER),
    )
    fingerprint = loading.fingerprint(loaded.model, loaded.variables)
    run_folder.check_start(workdir, fingerprint)
    codes = _codes(config, loaded, data.image_sources, fingerprint, workdir)
    stage = InstructStage(config, data, loaded, codes)
    del loaded  # The stage hands its variables over to training.
    runner.train_and_report(stage, config, workdir, mesh, CURVES)


def _codes(config, loaded, sources, fingerprint, workdir):
  """Opens the codes that `data.codes` asks for; None where it asks for none."""
  folder = config.data.codes
  if folder is None:
    return None
  views = views_lib.views(config.data.flip, config.data.shift)
  open_codes = functools.partial(
    code_cache.open_codes,
    sources=sources,
    fingerprint=fingerprint,
    views=views,
  )
  if folder != "auto":
    return open_codes(folder)
  for earlier in _earlier_codes(loaded):
    try:
      codes = open_codes(earlier)
      print(f"codes of {earlier}", flush=True)
      return codes
    except config_lib.ConfigError as error:
      print(f"encoding anew: {error}", flush=True)
  encoding.encode_sources(
    loaded,
    sources,
    workdir / _CODES,
    views=views,
    batch_size=config.data.global_batch_size,
  )
  return open_codes(workdir / _CODES)


def _earlier_codes(loaded: loading.Loaded) -> Iterator[pathlib.Path]:
  """Yields the codes of the runs of stage II that a run goes on from.

  They have the same tokenizer.
  """
  runs = (loaded.workdir, loaded.config), *config_lib.starts(loaded.config)
  for workdir, config in runs:
    if config.stage != "instruct":
      return
    own = config.data.codes in (None, "auto")
    folder = workdir / _CODES if own else pathlib.Path(config.data.codes)
    if folder.is_dir():
      yield folder
