"""Trains a visual tokenizer alone, with a codebook of its own.

METHOD section 2: encoder, quantizer and decoder, no LLM. Stage I
(`stages.pretrain`) builds on the same class.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from unicode_jax import (
  codebook as codebook_lib,
  data as data_lib,
  loading,
  sharding,
)
from unicode_jax.data import pipeline
from unicode_jax.models import unicode as unicode_lib
from unicode_jax.stages import runner
from unicode_jax.training import (
  adversarial,
  alarm as alarm_lib,
  optimizer as optimizer_lib,
  perceptual,
  phase as phase_lib,
  state as state_lib,
  steps,
  visual_evaluation,
)

PICTURES_PER_SET = 8
EVALUATED_IMAGES = 64  # At a time.
# Of each source, for the final statistics of codes over the training set.
MAX_TRAINING_IMAGES = 50_000

CURVES = {
  "Reconstruction loss": ("tokenizer/l1_loss", "tokenizer/l2_loss"),
  "PSNR": ("psnr",),
  "Codebook usage": ("usage/",),
  "Perplexity": ("perplexity/",),
  "Residual energy": ("residual_energy/",),
  "Held-out PSNR": ("eval/openmoji_heldout/psnr/", "eval/folder_heldout/psnr/"),
  "Held-out usage": (
    "eval/openmoji_heldout/usage/",
    "eval/folder_heldout/usage/",
  ),
}


def spread(images: np.ndarray) -> np.ndarray:
  """Picks a few images evenly over a set, which may be sorted by name."""
  return images[:: -(-len(images) // PICTURES_PER_SET)]


class TokenizerStage:
  """Image reconstruction at every step."""

  def __init__(
    self,
    config,
    data: data_lib.Data | None,
    model: unicode_lib.UniCode,
    valid: np.ndarray,
  ):
    """Prepares the steps.

    Args:
      config: Resolved ConfigDict.
      data: Images and texts; None if only the programs are wanted.
      model: Architecture.
      valid: bool[K], ids that may be visual codes.
    """
    self.config = config
    self.data = data
    self.model = model
    self.valid = valid
    self.total_steps = config.num_steps
    self.alarm_config = alarm_lib.AlarmConfig(**config.alarm)
    self.trained = ("encoder", "decoder")
    if config.codebook.update_rule == "gradient":
      self.trained += ("codebook",)
    self.optimizers = self._make_optimizers()
    loss = config.tokenizer.loss
    self.critic = self.perceptual_weights = None
    if loss.adversarial > 0:
      self.critic = adversarial.Critic(
        channels=loss.disc_channels,
        image_size=config.image_size,
        weight=loss.adversarial,
        start=loss.disc_start,
        optimizer=self.optimizers["discriminator"],
      )
    if loss.perceptual > 0:
      self.perceptual_weights = (
        perceptual.weight_shapes()
        if data is None
        else perceptual.load_weights(loss.perceptual_weights)
      )
    self.phases = self._make_phases()

  def _optimizer(self, name: str, num_steps: int):
    settings = optimizer_lib.OptimizerConfig(**self.config.optimizer[name])
    return optimizer_lib.make_optimizer(settings, num_steps)

  def _tokenizer_updates(self) -> int:
    return self.config.num_steps

  def _make_optimizers(self):
    updates = self._tokenizer_updates()
    optimizers = {"tokenizer": self._optimizer("tokenizer", updates)}
    if self.config.tokenizer.loss.adversarial > 0:
      before = self.config.tokenizer.loss.disc_start / self.config.num_steps
      optimizers["discriminator"] = self._optimizer(
        "discriminator", round(updates * max(0.0, 1.0 - before))
      )
    return optimizers

  def _make_phases(self) -> dict[str, phase_lib.Phase]:
    return {
      "tokenizer": self._image_phase("tokenizer", self.trained),
    }

  def _image_phase(self, name: str, trained) -> phase_lib.Phase:
    loss = self.config.tokenizer.loss
    step = steps.make_tokenizer_step(
      self.model,
      steps.LossConfig(
        l1=loss.l1,
        l2=loss.l2,
        commitment=loss.commitment,
        codebook=loss.codebook,
        perceptual=loss.perceptual,
        depth_dropout=self.config.tokenizer.depth_dropout,
      ),
      self.optimizers[name],
      trained=trained,
      opt_name=name,
      critic=self.critic,
    )
    return phase_lib.Phase(
      name=name,
      stream="image",
      step=step,
      constants=self.perceptual_weights,
      items=self.config.data.global_batch_size,
      unit="images",
    )

  def start(self, mesh: jax.sharding.Mesh):
    """Returns None: this stage begins from nothing."""
    del mesh

  def init(self, key: jax.Array, start=None) -> state_lib.TrainState:
    """Draws the initial state, around the parameters that `start` has."""
    model_key, critic_key, run_key = jax.random.split(key, 3)
    variables = self.model.init(model_key, jnp.asarray(self.valid), start)
    params = variables.params
    groups = {
      "tokenizer": {name: params[name] for name in self.trained},
      "finetune": {"decoder": params["decoder"]},
      "llm": params.get("llm"),
    }
    discriminator = {}
    if self.critic is not None:
      discriminator = self.critic.init(critic_key)
      groups["discriminator"] = discriminator
    return state_lib.TrainState(
      step=jnp.zeros((), jnp.int32),
      rng=jax.random.key_data(run_key),
      variables=variables,
      discriminator=discriminator,
      opt_state={
        name: optimizer.init(groups[name])
        for name, optimizer in self.optimizers.items()
      },
    )

  def make_iterators(self, start, share):
    """Opens the stream of images."""
    settings = self.config.data
    return {
      "image": pipeline.image_iterator(
        self.data.image_sources,
        self.data.image_weights,
        global_batch_size=settings.global_batch_size,
        seed=self.config.seed,
        flip=settings.flip,
        shift=settings.shift,
        crop_scale=settings.crop_scale,
        process_index=share[0],
        process_count=share[1],
        num_workers=settings.num_workers,
        start=start["image"],
      )
    }

  def batch_names(self, stream: str, batch: int) -> list[str]:
    """Names the images of a batch."""
    del stream
    return pipeline.image_batch_names(
      self.data.image_sources,
      self.data.image_weights,
      global_batch_size=self.config.data.global_batch_size,
      seed=self.config.seed,
      batch=batch,
    )

  def phase(self, step: int) -> phase_lib.Phase:
    """Returns the only kind of step."""
    del step
    return self.phases["tokenizer"]

  def transition(self, step: int) -> phase_lib.Transition | None:
    """Returns None: a private codebook has nothing to follow."""
    del step
    return None

  def summarize(self, state, window, batch) -> dict[str, float]:
    """Adds codebook statistics over the log window."""
    del state, batch
    counts = window.pop("code_counts", None)
    values = {name: float(value) for name, value in window.items()}
    if counts is not None:
      statistics = codebook_lib.codebook_statistics(counts, self.valid)
      for name, per_depth in statistics.items():
        values |= {
          f"{name}/depth{d + 1}": float(v) for d, v in enumerate(per_depth)
        }
    return values

  def _residual_energy(self, metrics) -> list[float]:
    return [
      metrics[f"residual_energy/depth{d + 1}"] for d in range(self.model.depth)
    ]

  def growing_energy(self, metrics) -> str | None:
    """Says which depth adds energy, if one does (H2)."""
    return alarm_lib.growing_energy(
      self._residual_energy(metrics), self.model.codebook.l2_normalize
    )

  def likely_cause(self, metrics) -> str:
    """Names the hazard that the metrics point to."""
    return alarm_lib.likely_cause(
      self._residual_energy(metrics),
      feature_std=metrics["tokenizer/feature_std"],
      l2_normalize=self.model.codebook.l2_normalize,
      code_dim=self.model.codebook.code_dim,
      paradigm=self.model.codebook.paradigm,
      code_agreement=metrics.get("code_agreement"),
    )

  def evaluate(self, state, *, final: bool) -> dict[str, float]:
    """Measures every held-out set; at the end also all training codes."""
    result, size = {}, sharding.divisible_batch(EVALUATED_IMAGES)
    if final:
      measured = visual_evaluation.evaluate_codes(
        self.model,
        state.variables,
        itertools.chain.from_iterable(
          pipeline.source_batches(source, MAX_TRAINING_IMAGES, size)
          for source in self.data.image_sources
        ),
      )
      result |= {f"eval/train/{k}": v for k, v in measured.items()}
    for name, images in self.data.heldout_images.items():
      measured = visual_evaluation.evaluate_reconstruction(
        self.model,
        state.variables,
        pipeline.heldout_image_batches(images, size),
      )
      result |= {f"eval/{name}/{k}": v for k, v in measured.items()}
    return result

  def pictures(self, state):
    """Returns originals and reconstructions of a few held-out images."""
    return {
      name: visual_evaluation.reconstruction_columns(
        self.model, state.variables, pipeline.to_float(spread(images))
      )
      for name, images in self.data.heldout_images.items()
    }

  def headline(self, metrics) -> str:
    """Says the metrics in a few words."""
    words = {
      "loss": "tokenizer/loss",
      "psnr": "psnr",
      "usage": "usage/depth1",
      "perplexity": "perplexity/depth1",
      "drift": "drift",
      "agreement": "code_agreement",
      "text": "text/loss",
    }
    return "  ".join(
      f"{word} {metrics[name]:.4g}"
      for word, name in words.items()
      if name in metrics
    )


def run(config, workdir: pathlib.Path) -> None:
  """Runs the stage.

  Args:
    config: Validated ConfigDict with `stage="tokenizer"`.
    workdir: Run folder; a run that is there is resumed.
  """
  with runner.prepared(config, workdir) as mesh:
    data = runner.load_data(config, with_text=False)
    valid = loading.valid_codes(config, None)
    stage = TokenizerStage(config, data, loading.build_model(config), valid)
    runner.train_and_report(stage, config, workdir, mesh, CURVES)
