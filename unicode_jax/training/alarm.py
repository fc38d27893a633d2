"""The collapse alarm: says aloud when the codebook stops being used.

Codebooks collapse silently: the loss still falls while a handful of codes does
all the work. This watches usage and perplexity at depth 1 and, when one stays
below its floor for long enough, names the likely cause (METHOD section 6).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools

from unicode_jax import config as config_lib


class CollapseError(config_lib.RunError):
  """Raised when the alarm is configured to stop the run."""


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
  """When to raise the alarm.

  Attributes:
    usage_floor: Smallest tolerated share of valid codes in use at depth 1.
    perplexity_floor: Smallest tolerated perplexity of the codes at depth 1.
    patience: Steps for which either must stay below its floor.
    stop: Whether the alarm ends the run.
  """

  usage_floor: float
  perplexity_floor: float
  patience: int
  stop: bool


def growing_energy(
  residual_energy: Sequence[float], l2_normalize: bool
) -> str | None:
  """Says which depth adds energy instead of taking it away (H2).

  Args:
    residual_energy: float[D], share of the input's energy left after each
      depth.
    l2_normalize: Whether selection is by cosine.

  Returns:
    One sentence with cause and remedy, None if the energy never grows.
  """
  energies = [1.0, *residual_energy]
  for d, (before, after) in enumerate(itertools.pairwise(energies), start=1):
    if after > before:
      return (
        f"depth {d} adds energy (residual {before:.3g} -> {after:.3g}): "
        + (
          "the encoder moves faster than the gains follow; lower "
          "optimizer.tokenizer.learning_rate or codebook.gain_decay"
          if l2_normalize
          else "the encoder's scale does not match the table's; set "
          "codebook.l2_normalize=True"
        )
      )
  return None


def likely_cause(
  residual_energy: Sequence[float],
  *,
  feature_std: float,
  l2_normalize: bool,
  code_dim: int,
  paradigm: str,
  code_agreement: float | None,
) -> str:
  """Names the hazard that fits the measurements best.

  Args:
    residual_energy: float[D], share of the input's energy left after each
      depth.
    feature_std: Standard deviation of the encoder's output over a batch.
    l2_normalize: Whether selection is by cosine.
    code_dim: Dimension in which codes are selected.
    paradigm: How codebook and table relate.
    code_agreement: Share of ids that the LLM's table would choose too, or None
      where there is no LLM.

  Returns:
    One sentence with cause and remedy.
  """
  if not feature_std > 1e-3:
    return (
      f"the encoder's output is constant (std {feature_std:.2g}): the encoder "
      "collapsed; lower optimizer.tokenizer.learning_rate or "
      "tokenizer.loss.commitment"
    )
  growth = growing_energy(residual_energy, l2_normalize)
  if growth is not None and not l2_normalize:
    return growth
  if code_dim > 64 or not l2_normalize:
    return (
      f"nearest-code search in {code_dim} dimensions"
      f"{'' if l2_normalize else ' without l2 normalisation'} collapses on "
      "rows of near-constant norm; use codebook.code_dim between 16 and 32 and "
      "codebook.l2_normalize=True"
    )
  drifting = code_agreement is not None and code_agreement < 0.5
  if paradigm == "language_driven" and drifting:
    return (
      f"the codebook left the LLM's table (code agreement {code_agreement:.2f})"
      "; lower codebook.sync_decay or codebook.sync_every"
    )
  if growth is not None:
    return growth
  return (
    "the encoder sends everything to few codes; raise "
    "tokenizer.loss.commitment, lower optimizer.tokenizer.learning_rate, or "
    "check that the images differ"
  )


class CollapseAlarm:
  """Counts how long usage or perplexity has been below its floor."""

  def __init__(self, config: AlarmConfig, below_since: int | None = None):
    """Starts the watch.

    Args:
      config: Floors and patience.
      below_since: Step since which a floor has been undercut, from a
        checkpoint.
    """
    self.config = config
    self.below_since = below_since
    self._rung = False

  def update(
    self, step: int, metrics: Mapping[str, float], cause: str
  ) -> str | None:
    """Looks at one log window.

    Args:
      step: Steps done.
      metrics: Holds "usage/depth1" and "perplexity/depth1".
      cause: Sentence of `likely_cause`.

    Returns:
      The alarm's text, once per collapse; None while all is well.
    """
    usage = metrics["usage/depth1"]
    perplexity = metrics["perplexity/depth1"]
    well = (
      usage >= self.config.usage_floor
      and perplexity >= self.config.perplexity_floor
    )
    if well:
      self.below_since, self._rung = None, False
      return None
    if self.below_since is None:
      self.below_since = step
    if self._rung or step - self.below_since < self.config.patience:
      return None
    self._rung = True
    return (
      f"CODEBOOK COLLAPSE at step {step}: usage {usage:.4f} (floor "
      f"{self.config.usage_floor}), perplexity {perplexity:.1f} (floor "
      f"{self.config.perplexity_floor}) at depth 1 since step "
      f"{self.below_since}. Likely cause: {cause}."
    )
