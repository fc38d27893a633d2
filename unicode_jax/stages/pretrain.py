"""Stage I: visual tokenizer and LLM in turns, codebook and token table in step.

METHOD section 3. One cycle is `schedule.tokenizer_steps` of image
reconstruction, then `schedule.llm_steps` of text instruction data. When all
cycles are done the codebook snaps to the LLM's table (for the paradigms in
which they can differ and may be joined) and the decoder alone is finetuned on
the final codes (H3).

  paradigm          codebook C in a cycle             LLM's table E_L
  frozen            never changes                     trained on text
  dual              C <- V(E_L), trained on images    E_L <- C, trained on text
  language_driven   trained; every sync_every steps   trained on text
                    C <- lambda C + (1-lambda) V(E_L)
  projected         V(E_L) at all times, P trained    trained on text
"""

import functools
import pathlib

import jax
import numpy as np

from unicode_jax import (
  codebook as codebook_lib,
  config as config_lib,
  data as data_lib,
  loading,
  quantizer as quantizer_lib,
  sharding,
)
from unicode_jax.data import pipeline
from unicode_jax.models import llama as llama_lib
from unicode_jax.stages import runner, tokenizer as tokenizer_stage
from unicode_jax.training import phase as phase_lib, steps

CURVES = tokenizer_stage.CURVES | {
  "Text loss": ("text/loss",),
  "Held-out text perplexity": ("eval/text_perplexity",),
  "Drift": ("drift",),
  "Code agreement": ("code_agreement",),
}


class PretrainStage(tokenizer_stage.TokenizerStage):
  """The alternation, and the decoder-only finetune after it."""

  def __init__(self, config, data: data_lib.Data | None, model, valid):
    """Prepares the steps; see the base class for the arguments."""
    self.schedule = config.schedule
    self.cycle = config.schedule.tokenizer_steps + config.schedule.llm_steps
    super().__init__(config, data, model, valid)
    self.total_steps = config_lib.total_steps(config)

  @functools.cached_property
  def train_text(self):
    """Rows of the training text."""
    return pipeline.PackedText(
      self.data.train_texts,
      self.data.text_tokenizer,
      self.config.text.sequence_length,
      "training text",
    )

  @functools.cached_property
  def heldout_text(self):
    """Batches of `pipeline.heldout_text_batches`."""
    return pipeline.heldout_text_batches(
      self.data.heldout_texts,
      self.data.text_tokenizer,
      sequence_length=self.config.text.sequence_length,
      global_batch_size=self.config.text.global_batch_size,
    )

  def start(self, mesh: jax.sharding.Mesh):
    """Returns the parameters of the runs to start from, None without any."""
    params = {}
    if self.config.init_from is not None:
      trained = loading.load(self.config.init_from, mesh=mesh).variables.params
      params |= {name: trained[name] for name in ("encoder", "decoder")}
    if self.config.llm_from is not None:
      llm = loading.load_llm(self.config.llm_from, mesh=mesh)
      params["llm"] = llama_lib.with_layers_as(
        llm.params, self.model.llama.scan_layers
      )
    if not params:
      return None
    return sharding.put_state(params, mesh)

  def _tokenizer_updates(self) -> int:
    cycles, rest = divmod(self.config.num_steps, self.cycle)
    per_cycle = self.schedule.tokenizer_steps
    return cycles * per_cycle + min(rest, per_cycle)

  def _make_optimizers(self):
    optimizers = super()._make_optimizers()
    llm_updates = self.config.num_steps - self._tokenizer_updates()
    optimizers["llm"] = self._optimizer("llm", llm_updates)
    if self.schedule.finetune_steps:
      optimizers["finetune"] = self._optimizer(
        "tokenizer", self.schedule.finetune_steps
      )
    return optimizers

  def _make_phases(self):
    phases = super()._make_phases()
    text = self.config.text
    phases["llm"] = phase_lib.Phase(
      name="llm",
      stream="text",
      step=steps.make_llm_step(
        self.model, self.optimizers["llm"], self.config.microbatches
      ),
      items=text.global_batch_size * text.sequence_length,
      unit="tokens",
    )
    if self.schedule.finetune_steps:
      phases["finetune"] = self._image_phase("finetune", ("decoder",))
    return phases

  def make_iterators(self, start, share):
    """Opens the streams of images and of text."""
    return super().make_iterators(start, share) | {
      "text": pipeline.text_iterator(
        self.train_text,
        seed=self.config.seed,
        global_batch_size=self.config.text.global_batch_size,
        process_index=share[0],
        process_count=share[1],
        num_workers=self.config.data.num_workers,
        start=start["text"],
      )
    }

  def batch_names(self, stream: str, batch: int) -> list[str]:
    """Names the images or the rows of text of a batch."""
    if stream == "image":
      return super().batch_names(stream, batch)
    return pipeline.text_batch_names(
      self.train_text,
      global_batch_size=self.config.text.global_batch_size,
      seed=self.config.seed,
      batch=batch,
    )

  def phase(self, step: int) -> phase_lib.Phase:
    """Returns what the schedule says for a step (0-based)."""
    if step >= self.config.num_steps:
      return self.phases["finetune"]
    in_cycle = step % self.cycle
    image_turn = in_cycle < self.schedule.tokenizer_steps
    return self.phases["tokenizer" if image_turn else "llm"]

  def transition(self, step: int) -> phase_lib.Transition | None:
    """Says how rows move between table and codebook after a step.

    A round of `dual` that the end of the alternation cuts short is written back
    like any other, so that what the tokenizer learned is not lost.
    """
    paradigm = self.config.codebook.paradigm
    in_cycle = step % self.cycle
    if step > self.config.num_steps or paradigm in ("frozen", "projected"):
      return None
    if step == self.config.num_steps:
      open_round = 0 < in_cycle <= self.schedule.tokenizer_steps
      if paradigm == "dual" and open_round:
        return self.write_back_and_snap
      return self.snap
    if paradigm == "dual":
      return {
        self.schedule.tokenizer_steps: self.write_back,
        0: self.load_from_language,
      }.get(in_cycle)
    due = step % self.config.codebook.sync_every == 0
    return self.sync if due else None

  def _args(self, state):
    variables = state.variables
    return (
      variables.params["codebook"],
      variables.codebook_state,
      self.model.embedding(variables.params),
      variables.valid,
      self.model.codebook,
    )

  def _replace(self, state, **groups):
    params = {**state.variables.params, **groups}
    return state.replace(variables=state.variables.replace(params=params))

  def sync(self, state):
    """Pulls the codebook towards the LLM's table."""
    return self._replace(state, codebook=codebook_lib.sync(*self._args(state)))

  def snap(self, state):
    """Makes the codebook the LLM's table."""
    return self._replace(state, codebook=codebook_lib.snap(*self._args(state)))

  def load_from_language(self, state):
    """Begins a round of `dual`."""
    codebook = codebook_lib.load_from_language(*self._args(state))
    return self._replace(state, codebook=codebook)

  def write_back(self, state):
    """Ends the tokenizer's part of a round of `dual`."""
    embedding = codebook_lib.write_back(*self._args(state))
    llm = state.variables.params["llm"]
    return self._replace(
      state, llm={**llm, "embed_tokens": {"embedding": embedding}}
    )

  def write_back_and_snap(self, state):
    """Ends the last round of `dual` when it is cut short."""
    return self.snap(self.write_back(state))

  @functools.partial(jax.jit, static_argnums=0)
  def _drift(self, state):
    return sharding.replicate(codebook_lib.drift(*self._args(state)))

  @functools.partial(jax.jit, static_argnums=0)
  def _agreement(self, variables, image):
    model = self.model
    agreement = quantizer_lib.code_agreement(
      model.features(variables, image),
      model.table(variables),
      model.language_table(variables),
      variables.codebook_state["gain"],
      variables.valid,
      kind=model.quantizer,
      depth=model.depth,
    )
    return sharding.replicate(agreement)

  def summarize(self, state, window, batch) -> dict[str, float]:
    """Adds drift and code agreement (H3), on the latest images."""
    values = super().summarize(state, window, batch)
    values["drift"] = float(self._drift(state))
    if batch is not None:
      agreement = self._agreement(state.variables, batch["image"])
      values["code_agreement"] = float(agreement)
    return values

  @functools.partial(jax.jit, static_argnums=0)
  def _heldout_text(self, llm_params, batch):
    batch = sharding.constrain_batch(batch)
    loss, aux = steps.text_loss(self.model, llm_params, batch)
    tokens = aux["num_tokens"]
    return sharding.replicate((loss * tokens, tokens))

  def evaluate(self, state, *, final: bool) -> dict[str, float]:
    """Adds held-out text perplexity."""
    result = super().evaluate(state, final=final)
    nats, tokens = 0.0, 0.0
    for batch in self.heldout_text:
      sums = self._heldout_text(state.variables.params["llm"], batch)
      nats, tokens = nats + float(sums[0]), tokens + float(sums[1])
    result["eval/text_perplexity"] = float(np.exp(nats / tokens))
    return result


def run(config, workdir: pathlib.Path) -> None:
  """Runs the stage.

  Args:
    config: Validated ConfigDict with `stage="pretrain"`.
    workdir: Run folder; a run that is there is resumed.
  """
  with runner.prepared(config, workdir) as mesh:
    data = runner.load_data(config, with_text=True)
    valid = loading.valid_codes(config, data.text_tokenizer)
    stage = PretrainStage(config, data, loading.build_model(config), valid)
    runner.train_and_report(stage, config, workdir, mesh, CURVES)
