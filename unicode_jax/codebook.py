"""The visual codebook, and how it is unified with the language's table.

Implements METHOD.md section 3 (the four paradigms, and the private codebook
that a tokenizer trained alone has) and hazards H1, H3, H4 and H5 of section 6.
Row k of the codebook and row k of the LLM's input embedding are one token.

Ids are chosen in a space of `code_dim` dimensions (H1), where the language is
seen through its view

  V(E) = (E - centre) @ P,

with `centre` the mean of E's valid rows and P scaled such that V's valid rows
have a root mean square of 1 per entry at the start. Differs from the paper,
which has code_dim = d_llm, P = 1 and no centring: set `projection="identity"`
for that (tables of real LLMs share a large common mean, see H1).

`dual` keeps the centre that it began with, the others follow the mean: a table
that is written back must be read back unchanged, also if its mean is not 0.

What is trained is `params`, what is only updated is `state`:

  paradigm                 params       state
  frozen                   -            projection, table, gain
  dual                     table        projection, centre, gain
  language_driven          table        projection, gain
  projected                projection   gain
  private                  table        gain, last_used

and with `update_rule="ema"` also `ema_counts`. All functions are pure and can
be jitted with `config` static. Does not do: the search
(`kernels.nearest_code`), the residuals and their losses (`quantizer`), or
deciding when to sync.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from unicode_jax import config as config_lib

PARADIGMS = config_lib.PARADIGMS
PROJECTIONS = ("pca", "random", "identity")
UPDATES = ("gradient", "ema")

_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
  """What the codebook is and how it moves.

  Attributes:
    paradigm: one of `PARADIGMS`.
    code_dim: dimensions of the space in which codes are chosen.
    depth: codes per position; one gain is kept for each.
    projection: one of `PROJECTIONS`, how P begins. "pca": the directions of
      the largest variance of the valid rows; "random": orthonormal columns.
    l2_normalize: whether the rows are made unit vectors before their use.
    sync_decay: lambda of `sync`, the share of C that one sync leaves.
    update_rule: one of `UPDATES`, what trains the table.
    ema_decay: decay per update of the counts of `ema_update`.
    gain_decay: decay per update of `fit_gain`.
    restart_dead_after: steps without use after which a code is restarted; 0
      turns it off. Only for a private codebook (H4).
  """

  paradigm: str = "projected"
  code_dim: int = 16
  depth: int = 4
  projection: str = "pca"
  l2_normalize: bool = True
  sync_decay: float = 0.9
  update_rule: str = "gradient"
  ema_decay: float = 0.99
  gain_decay: float = 0.99
  restart_dead_after: int = 0

  def __post_init__(self):
    for name, known in (
      ("paradigm", PARADIGMS),
      ("projection", PROJECTIONS),
      ("update_rule", UPDATES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"codebook.{name}={getattr(self, name)!r} is unknown: use one of "
          f"{', '.join(known)}."
        )
    for name in ("code_dim", "depth"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"codebook.{name}={getattr(self, name)} must be at least 1."
        )
    for name in ("sync_decay", "ema_decay", "gain_decay"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f"codebook.{name}={getattr(self, name)} must be in [0, 1]."
        )
    if self.update_rule == "ema" and self.paradigm in ("frozen", "projected"):
      raise ValueError(
        f'codebook.update_rule="ema" moves a table, and {self.paradigm!r} has '
        'none to move: use update_rule="gradient".'
      )
    if self.restart_dead_after < 0:
      raise ValueError(
        f"codebook.restart_dead_after={self.restart_dead_after} is "
        "negative: use 0 to turn restarts off."
      )
    if self.restart_dead_after:
      _check_private(self)


def init_codebook(key, embedding, valid, config: CodebookConfig):
  """Builds the codebook; where there is a language, it starts at its view.

  Args:
    key: for a random projection or a private table.
    embedding: float[K, E], the LLM's input embedding; None if private.
    valid: bool[K], True where a row may be a visual code.
    config: the rules.

  Returns:
    `params` and `state`, dicts as in the module's docstring. A gain of 0 means
    "not fitted yet" (see `fit_gain`).

  Raises:
    ValueError: if the embedding is missing or not wanted, or has too few
      dimensions for `code_dim`.
  """
  state = {"gain": jnp.zeros(config.depth)}
  if config.update_rule == "ema":
    state["ema_counts"] = jnp.ones(valid.shape)
  if config.paradigm == "private":
    if embedding is not None:
      raise ValueError(
        "A private codebook has no language to unify with: pass "
        "embedding=None, or choose another codebook.paradigm."
      )
    state["last_used"] = jnp.zeros(valid.shape, jnp.int32)
    shape = (valid.shape[0], config.code_dim)
    return {"table": jax.random.normal(key, shape)}, state
  if embedding is None:
    raise ValueError(
      f"codebook.paradigm={config.paradigm!r} needs the embedding of an "
      'LLM: pass it, or use paradigm="private".'
    )
  projection = _init_projection(key, embedding, valid, config)
  if config.paradigm == "projected":
    return {"projection": projection}, state
  state["projection"] = projection
  if config.paradigm == "dual":
    state["centre"] = _mean(embedding, valid)
  table = language_view({}, state, embedding, valid, config)
  if config.paradigm == "frozen":
    return {}, state | {"table": table}
  return {"table": table}, state


def language_view(params, state, embedding, valid, config: CodebookConfig):
  """Sees the language's table in the codebook's space: V(E).

  Args:
    params: of `init_codebook`; differentiable in the projection.
    state: of `init_codebook`.
    embedding: float[K, E]; no gradient passes to it.
    valid: bool[K], the rows whose mean is subtracted.
    config: the rules.

  Returns:
    float32[K, code_dim], not normalised.

  Raises:
    ValueError: if the codebook is private.
  """
  _check_paradigm(
    config, "a view of the language", *set(PARADIGMS) - {"private"}
  )
  embedding = lax.stop_gradient(embedding).astype(jnp.float32)
  centre = state.get("centre")
  if centre is None:
    centre = _mean(embedding, valid)
  projection = _projection(params, state)
  return jnp.matmul(embedding - centre, projection, precision=_HIGHEST)


def codebook_table(params, state, embedding, valid, config: CodebookConfig):
  """Returns the table that the quantizer searches and emits.

  Args:
    params: of `init_codebook`; differentiable in them.
    state: of `init_codebook`.
    embedding: float[K, E], without gradient; only `projected` reads it.
    valid: bool[K].
    config: the rules.

  Returns:
    float32[K, code_dim], rows of unit length if `config.l2_normalize`.
  """
  return _rows(_raw_table(params, state, embedding, valid, config), config)


def language_table(params, state, embedding, valid, config: CodebookConfig):
  """Returns what `codebook_table` would be if C were the language's view.

  Quantize with both tables to measure the code agreement (H3).

  Args:
    params: of `init_codebook`.
    state: of `init_codebook`.
    embedding: float[K, E].
    valid: bool[K].
    config: the rules.

  Returns:
    float32[K, code_dim].

  Raises:
    ValueError: if the codebook is private.
  """
  return _rows(language_view(params, state, embedding, valid, config), config)


def sync(params, state, embedding, valid, config: CodebookConfig):
  """Pulls the table to the language: C <- lambda C + (1 - lambda) V(E).

  The rule of UniCode's language-driven training (arXiv 2403.09072). Nothing
  flows to E. Rows that are not valid move too.

  Args:
    params: of `init_codebook`.
    state: of `init_codebook`.
    embedding: float[K, E].
    valid: bool[K].
    config: the rules; lambda is `sync_decay`.

  Returns:
    The new `params`.

  Raises:
    ValueError: unless the paradigm is `language_driven`.
  """
  _check_paradigm(config, "a sync", "language_driven")
  view = language_view(params, state, embedding, valid, config)
  table = params["table"]
  return params | {"table": table + (1 - config.sync_decay) * (view - table)}


def load_from_language(params, state, embedding, valid, config: CodebookConfig):
  """Begins a round of `dual`: C <- V(E), for every row.

  Args:
    params: of `init_codebook`.
    state: of `init_codebook`.
    embedding: float[K, E].
    valid: bool[K].
    config: the rules.

  Returns:
    The new `params`.

  Raises:
    ValueError: unless the paradigm is `dual`.
  """
  _check_paradigm(config, "loading from the language", "dual")
  return snap(params, state, embedding, valid, config)


def write_back(params, state, embedding, valid, config: CodebookConfig):
  """Ends a round of `dual`: changes E as little as makes V(E) = C.

  E <- E + (C - V(E)) pinv(P) on the valid rows. What of E is orthogonal to P's
  columns stays; with the identity projection this is E <- C / scale + centre.
  As the centre is fixed, `load_from_language` then returns C's valid rows, to
  the rounding of float32.

  Args:
    params: of `init_codebook`.
    state: of `init_codebook`.
    embedding: float[K, E].
    valid: bool[K]; other rows of the embedding stay.
    config: the rules.

  Returns:
    The new embedding, of the old one's shape and dtype.

  Raises:
    ValueError: unless the paradigm is `dual`.
  """
  _check_paradigm(config, "writing back", "dual")
  projection = _projection(params, state)
  gram = jnp.matmul(projection.T, projection, precision=_HIGHEST)
  inverse = jnp.linalg.solve(gram, projection.T)
  view = language_view(params, state, embedding, valid, config)
  change = jnp.matmul(params["table"] - view, inverse, precision=_HIGHEST)
  changed = (embedding + change).astype(embedding.dtype)
  return jnp.where(valid[:, None], changed, embedding)


def snap(params, state, embedding, valid, config: CodebookConfig):
  """Makes the table the language's view, C <- V(E), at the end of stage I.

  Args:
    params: of `init_codebook`.
    state: of `init_codebook`.
    embedding: float[K, E].
    valid: bool[K].
    config: the rules.

  Returns:
    The new `params`; unchanged where there is no table to move (`projected`
    is the view already, `frozen` is by definition what the view was).

  Raises:
    ValueError: if the codebook is private.
  """
  view = language_view(params, state, embedding, valid, config)
  return params | {"table": view} if "table" in params else params


def frozen_config(config: CodebookConfig) -> CodebookConfig:
  """Returns the rules of what `freeze` returns."""
  return dataclasses.replace(
    config, paradigm="frozen", update_rule="gradient", restart_dead_after=0
  )


def freeze(params, state, embedding, valid, config: CodebookConfig):
  """Fixes the table as it is, for stage II: the LLM moves, ids stay.

  Args:
    params: of `init_codebook`.
    state: of `init_codebook`.
    embedding: float[K, E].
    valid: bool[K].
    config: the rules.

  Returns:
    `params` and `state` of the paradigm "frozen" with the present table; a
    fixed centre is kept.

  Raises:
    ValueError: if the codebook is private.
  """
  _check_paradigm(config, "a frozen view", *set(PARADIGMS) - {"private"})
  frozen = {
    "gain": state["gain"],
    "projection": _projection(params, state),
    "table": _raw_table(params, state, embedding, valid, config),
  }
  if "centre" in state:
    frozen["centre"] = state["centre"]
  return {}, frozen


def drift(params, state, embedding, valid, config: CodebookConfig):
  """Measures how far the codebook is from the language (H3).

  Args:
    params: of `init_codebook`.
    state: of `init_codebook`.
    embedding: float[K, E].
    valid: bool[K], the rows that are compared.
    config: the rules.

  Returns:
    float32[], ||C - V(E)|| / ||V(E)|| in Frobenius norms of the tables before
    normalisation. Exactly 0 for `projected`.

  Raises:
    ValueError: if the codebook is private.
  """
  view = language_view(params, state, embedding, valid, config)
  if config.paradigm == "projected":
    table = view
  else:
    table = _raw_table(params, state, embedding, valid, config)
  rows = valid[:, None]
  distance = jnp.linalg.norm(jnp.where(rows, table - view, 0))
  return distance / jnp.linalg.norm(jnp.where(rows, view, 0))


def fit_gain(state, gain_fit, config: CodebookConfig):
  """Moves each depth's gain towards its least-squares fit (H2).

  gain <- decay gain + (1 - decay) fit; the first fit is taken as it is.

  Args:
    state: of `init_codebook`.
    gain_fit: float32[D], sum <r, c> / sum <c, c> over a batch, positive: the
      quantizer's `gain_fit`.
    config: the rules.

  Returns:
    The new `state`.
  """
  gain = state["gain"]
  decay = jnp.where(gain > 0, config.gain_decay, 0.0)
  fitted = decay * gain + (1 - decay) * lax.stop_gradient(gain_fit)
  return state | {"gain": fitted}


def ema_update(params, state, counts, sums, config: CodebookConfig):
  """Moves the rows towards the mean of what was assigned to them (H5).

  The exponential moving averages of VQ-VAE (arXiv 1711.00937), n <- decay n +
  (1 - decay) counts and likewise for the sums, with C = sums / n. As the sums
  are n C at all times, only n is kept, so that a sync which moves C is not
  undone. The table begins with a weight of one assignment a row. With
  `l2_normalize` a row turns as its unit vector would, and keeps its length,
  which `drift` and `sync` compare with the language's.

  Args:
    params: of `init_codebook`.
    state: of `init_codebook`.
    counts: float32[K], assignments over *all* depths and devices.
    sums: float32[K, code_dim], of what was assigned, over the same.
    config: the rules.

  Returns:
    The new `params` and `state`. Rows without counts are the same to the bit.

  Raises:
    ValueError: unless `config.update_rule` is "ema".
  """
  if config.update_rule != "ema":
    raise ValueError(
      f"codebook.update_rule={config.update_rule!r} keeps no averages: use "
      '"ema".'
    )
  counts, sums = lax.stop_gradient((counts, sums))
  weight = 1 - config.ema_decay
  ema_counts = config.ema_decay * state["ema_counts"] + weight * counts
  table = params["table"]
  rows = _rows(table, config)
  moved = rows + (weight / jnp.maximum(ema_counts, 1e-12))[:, None] * (
    sums - counts[:, None] * rows
  )
  if config.l2_normalize:
    moved = _unit(moved) * jnp.linalg.norm(table, axis=1, keepdims=True)
  table = jnp.where(counts[:, None] > 0, moved, table)
  return params | {"table": table}, state | {"ema_counts": ema_counts}


def restart_dead_codes(
  key, params, state, counts, step, candidates, config: CodebookConfig
):
  """Gives rows that were long unused the place of a random input (H4).

  Overwriting a row that is also a word's would destroy the word, so only a
  private codebook may do this. Moments that an optimizer keeps for a restarted
  row are left to decay.

  Args:
    key: draws the candidates.
    params: of `init_codebook`.
    state: of `init_codebook`.
    counts: float32[K], assignments at this step over all depths.
    step: int32[], this step.
    candidates: float32[N, code_dim], inputs of the search (z / gain).
    config: the rules; `restart_dead_after` is the patience in steps.

  Returns:
    The new `params` and `state`.

  Raises:
    ValueError: unless the codebook is private and restarts are on.
  """
  _check_private(config)
  if not config.restart_dead_after:
    raise ValueError(
      "codebook.restart_dead_after=0 turns restarts off: set the steps."
    )
  last_used = jnp.where(counts > 0, step, state["last_used"])
  dead = step - last_used >= config.restart_dead_after
  picks = jax.random.randint(key, dead.shape, 0, candidates.shape[0])
  fresh = candidates[picks]
  if config.l2_normalize:
    fresh = _unit(fresh) * config.code_dim**0.5
  state = state | {"last_used": jnp.where(dead, step, last_used)}
  if "ema_counts" in state:
    state["ema_counts"] = jnp.where(dead, 1.0, state["ema_counts"])
  table = jnp.where(dead[:, None], fresh, params["table"])
  return params | {"table": table}, state


def codebook_statistics(counts, valid):
  """Says how much of the codebook each depth uses.

  Args:
    counts: float32[D, K], assignments.
    valid: bool[K].

  Returns:
    "usage": float32[D], the share of valid codes that were assigned at all;
    "perplexity": float32[D], the exponential of the assignments' entropy in
    nats: the number of codes that, used equally, would be as diverse. 1 where
    nothing was assigned.
  """
  counts = jnp.where(valid, counts, 0)
  total = jnp.sum(counts, axis=1, keepdims=True)
  share = counts / jnp.maximum(total, 1)
  entropy = jax.scipy.special.entr(share).sum(axis=1)
  usage = jnp.sum(counts > 0, axis=1) / jnp.sum(valid)
  return {"usage": usage, "perplexity": jnp.exp(entropy)}


def _init_projection(key, embedding, valid, config):
  """Builds P: orthonormal columns, times one scale."""
  dim = embedding.shape[1]
  if config.code_dim > dim:
    raise ValueError(
      f"codebook.code_dim={config.code_dim} is larger than the "
      f"embedding's {dim} dimensions: use at most {dim}."
    )
  rows = embedding.astype(jnp.float32) - _mean(embedding, valid)
  rows = jnp.where(valid[:, None], rows, 0)
  if config.projection == "identity":
    if config.code_dim != dim:
      raise ValueError(
        f'codebook.projection="identity" needs code_dim={dim}, the '
        f'embedding\'s, not {config.code_dim}: set it, or use "pca".'
      )
    basis = jnp.eye(dim)
  elif config.projection == "pca":
    covariance = jnp.matmul(rows.T, rows, precision=_HIGHEST)
    basis = jnp.linalg.eigh(covariance)[1][:, ::-1][:, : config.code_dim]
    # Eigenvectors have no sign of their own: make the largest entry positive.
    largest = jnp.argmax(jnp.abs(basis), axis=0, keepdims=True)
    basis *= jnp.sign(jnp.take_along_axis(basis, largest, axis=0))
  else:
    shape = (dim, config.code_dim)
    basis = jnp.linalg.qr(jax.random.normal(key, shape))[0]
  view = jnp.matmul(rows, basis, precision=_HIGHEST)
  mean_square = jnp.sum(view**2) / (jnp.sum(valid) * config.code_dim)
  return basis * lax.rsqrt(mean_square)


def _mean(embedding, valid):
  """Averages the valid rows: float32[E]."""
  rows = jnp.where(valid[:, None], embedding.astype(jnp.float32), 0)
  return jnp.sum(rows, axis=0) / jnp.sum(valid)


def _projection(params, state):
  """Finds P, where it is trained or where it is fixed."""
  if "projection" in params:
    return params["projection"]
  return state["projection"]


def _raw_table(params, state, embedding, valid, config):
  """Returns C before normalisation."""
  if config.paradigm == "projected":
    return language_view(params, state, embedding, valid, config)
  return params["table"] if "table" in params else state["table"]


def _rows(table, config):
  """Applies `l2_normalize`."""
  return _unit(table) if config.l2_normalize else table


def _unit(x):
  """Makes rows unit vectors; a row of zeros stays, with a finite gradient."""
  square = jnp.sum(x**2, axis=-1, keepdims=True)
  return x * lax.rsqrt(jnp.maximum(square, 1e-24))


def _check_private(config):
  """Raises unless the rows are the tokenizer's own."""
  if config.paradigm != "private":
    raise ValueError(
      f"codebook.paradigm={config.paradigm!r}: its rows belong to the LLM, "
      "and a restart would overwrite words. Set restart_dead_after=0, or "
      'paradigm="private".'
    )


def _check_paradigm(config, what, *paradigms):
  """Raises unless the paradigm has the operation."""
  if config.paradigm not in paradigms:
    raise ValueError(
      f"codebook.paradigm={config.paradigm!r} has no place for {what}: "
      f"that is for {', '.join(sorted(paradigms))}."
    )
