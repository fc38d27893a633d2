"""The optimizer steps that stages are made of: image reconstruction and text.

Implements the losses of METHOD section 2 around `models.unicode` and the text
step of section 3. Each factory returns a pure (state, batch) -> (state,
metrics) function, to be jitted by the stage.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import optax

from unicode_jax import codebook as codebook_lib, sharding
from unicode_jax.models import llama as llama_lib, unicode as unicode_lib
from unicode_jax.training import (
  accumulation,
  adversarial,
  losses as losses_lib,
  perceptual,
  reconstruction_loss,
  state as state_lib,
)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the tokenizer's loss.

  Attributes:
    l1: Weight of the mean absolute error (pixels in [-1, 1]).
    l2: Weight of the mean squared error.
    commitment: beta, pulls the encoder towards the codes.
    codebook: Pulls a trained codebook towards the encoder.
    perceptual: Weight of the LPIPS-like distance; 0 leaves it out.
    depth_dropout: Share of images that are decoded from only their first d
      codes, d uniform in 1..D-1, so that every prefix is a picture.
  """

  l1: float
  l2: float
  commitment: float
  codebook: float
  perceptual: float
  depth_dropout: float


def drop_depth(
  key: jax.Array, quantized: jax.Array, partial: jax.Array, rate: float
) -> jax.Array:
  """Replaces some images' features by the sum of their first d codes.

  Args:
    key: PRNG key.
    quantized: float32[B, h, w, C], all codes, straight-through.
    partial: float32[D, B, h, w, C], cumulative sums; no gradient passes.
    rate: Share of images for which d is drawn from 1..D-1.

  Returns:
    float32[B, h, w, C]; the gradient with respect to `quantized` is identity.
  """
  depth, batch = partial.shape[:2]
  if rate == 0.0 or depth == 1:
    return quantized
  which, amount = jax.random.split(key)
  chosen = jax.random.bernoulli(which, rate, (batch,))
  d = jax.random.randint(amount, (batch,), 0, depth - 1)
  cut = partial[d, jnp.arange(batch)] - partial[-1]
  cut = jnp.where(chosen[:, None, None, None], cut, 0.0)
  return quantized + jax.lax.stop_gradient(cut)


def make_tokenizer_step(
  model: unicode_lib.UniCode,
  losses: LossConfig,
  optimizer: optax.GradientTransformation,
  *,
  trained: Sequence[str],
  opt_name: str,
  critic: adversarial.Critic | None = None,
) -> Callable:
  """Makes the image reconstruction step.

  Args:
    model: The model.
    losses: Weights.
    optimizer: Updates the trained groups.
    trained: Parameter groups that move, of "encoder", "decoder", "codebook".
    opt_name: Key of the optimizer's state in `TrainState.opt_state`.
    critic: PatchGAN critic and its optimizer, None without adversarial loss.

  Returns:
    (state, {"image": float32[B, H, W, 3]}, perceptual weights or None) ->
    (state, metrics). Gains and, with `codebook.update_rule="ema"`, code
    statistics move too (METHOD H2, H5), unless only the decoder is trained:
    then every image keeps its codes (H3).
  """
  decoder_only = tuple(trained) == ("decoder",)

  def code_loss(groups, state, image):
    variables = state.variables.replace(
      params={**state.variables.params, **groups}
    )
    z = model.features(variables, image)
    output = model.quantize(variables, z)
    features = drop_depth(
      jax.random.fold_in(state.step_key(), 0),
      output.quantized,
      output.partial,
      losses.depth_dropout,
    )
    reconstruction = model.decode_features(variables, features)
    terms = {
      "commitment_loss": output.commitment_loss,
      "codebook_loss": output.codebook_loss,
    }
    loss = (
      losses.commitment * terms["commitment_loss"]
      + losses.codebook * terms["codebook_loss"]
    )
    return (loss, reconstruction), (terms, output, z)

  def picture_loss(reconstruction, image, perceptual_weights):
    terms = {
      "l1_loss": reconstruction_loss.l1_loss(image, reconstruction),
      "l2_loss": reconstruction_loss.l2_loss(image, reconstruction),
    }
    loss = losses.l1 * terms["l1_loss"] + losses.l2 * terms["l2_loss"]
    if perceptual_weights is not None:
      terms["perceptual_loss"] = jnp.mean(
        perceptual.perceptual_distance(
          perceptual_weights, image, reconstruction
        )
      )
      loss += losses.perceptual * terms["perceptual_loss"]
    return loss, terms

  def step(state: state_lib.TrainState, batch, perceptual_weights):
    image = sharding.constrain(batch["image"], "image", None, None, None)
    variables = state.variables
    groups = {name: variables.params[name] for name in trained}
    (loss, reconstruction), pullback, (terms, output, z) = jax.vjp(
      lambda groups: code_loss(groups, state, image), groups, has_aux=True
    )
    (of_picture, picture_terms), cotangent = jax.value_and_grad(
      picture_loss, has_aux=True
    )(reconstruction, image, perceptual_weights)
    loss += of_picture
    terms |= picture_terms
    opt_state = dict(state.opt_state)
    discriminator = state.discriminator
    if critic is not None:
      added, generator_terms = critic.cotangent(
        discriminator,
        lambda cotangent: pullback((jnp.zeros(()), cotangent))[0],
        cotangent,
        reconstruction,
        state.step,
      )
      cotangent += added
      discriminator, opt_state["discriminator"], critic_terms = critic.update(
        discriminator,
        opt_state["discriminator"],
        image,
        reconstruction,
        state.step,
      )
      terms |= generator_terms | critic_terms
    (grads,) = pullback((jnp.ones(()), cotangent))
    updates, opt_state[opt_name] = optimizer.update(
      grads, opt_state[opt_name], groups
    )
    groups = optax.apply_updates(groups, updates)
    codebook_state = variables.codebook_state
    params = {**variables.params, **groups}
    if not decoder_only:
      codebook_state = codebook_lib.fit_gain(
        codebook_state, output.gain_fit, model.codebook
      )
      params["codebook"], codebook_state = _move_codebook(
        state, params["codebook"], codebook_state, output, z, model.codebook
      )
    metrics = {
      "tokenizer/loss": loss,
      **{f"tokenizer/{name}": value for name, value in terms.items()},
      "tokenizer/gradient_norm": optax.tree.norm(grads),
      "tokenizer/feature_std": jnp.std(z),
      "psnr": jnp.mean(reconstruction_loss.psnr(image, reconstruction)),
      "code_counts": output.counts,
      **per_depth("residual_energy", output.residual_energy),
    }
    state = state.replace(
      step=state.step + 1,
      variables=variables.replace(params=params, codebook_state=codebook_state),
      discriminator=discriminator,
      opt_state=opt_state,
    )
    return state, metrics

  return step


def _move_codebook(state, params, codebook_state, output, z, config):
  """Applies the rules that are not gradients, on this step's assignments."""
  if config.update_rule == "ema":
    params, codebook_state = codebook_lib.ema_update(
      params, codebook_state, jnp.sum(output.counts, 0), output.sums, config
    )
  if config.restart_dead_after:
    params, codebook_state = codebook_lib.restart_dead_codes(
      jax.random.fold_in(state.step_key(), 1),
      params,
      codebook_state,
      jnp.sum(output.counts, 0),
      state.step,
      z.reshape(-1, z.shape[-1]) / codebook_state["gain"][0],
      config,
    )
  return params, codebook_state


def make_llm_step(
  model: unicode_lib.UniCode,
  optimizer: optax.GradientTransformation,
  microbatches: int = 1,
) -> Callable:
  """Makes the text step: next-token prediction on answer tokens.

  Args:
    model: A model with an LLM.
    optimizer: Updates the LLM, its token table included.
    microbatches: Parts of the batch, see `accumulation`.

  Returns:
    (state, packed text batch, unused) -> (state, metrics).
  """

  def step(state: state_lib.TrainState, batch, constants=None):
    del constants
    params = state.variables.params
    (loss, aux), grads = accumulation.value_and_grad(
      lambda llm, batch: text_loss(model, llm, batch),
      params["llm"],
      batch,
      microbatches,
    )
    updates, opt_state = optimizer.update(
      grads, state.opt_state["llm"], params["llm"]
    )
    llm = optax.apply_updates(params["llm"], updates)
    state = state.replace(
      step=state.step + 1,
      variables=state.variables.replace(params={**params, "llm": llm}),
      opt_state={**state.opt_state, "llm": opt_state},
    )
    metrics = {
      "text/loss": loss,
      "text/accuracy": aux["correct"] / jnp.maximum(aux["num_tokens"], 1),
      "text/gradient_norm": optax.tree.norm(grads),
    }
    return state, metrics

  return step


def text_loss(model: unicode_lib.UniCode, llm_params, batch):
  """Returns mean cross entropy in nats per answer token, and counts."""
  hidden, _ = llama_lib.Llama(model.llama).apply(
    {"params": llm_params},
    batch["token_ids"],
    positions=batch["positions"],
    segment_ids=batch["segment_ids"],
    return_hidden=True,
  )
  return losses_lib.next_token_loss(
    hidden,
    llama_lib.head_kernel(llm_params, model.llama),
    batch["labels"],
    batch["loss_mask"],
  )


def per_depth(name: str, values: jax.Array) -> dict[str, jax.Array]:
  """Names the entries of float[D] "name/depth1" ... "name/depthD"."""
  return {f"{name}/depth{d + 1}": values[d] for d in range(values.shape[0])}
