"""UniCode in PyTorch: a language model that reads and draws pictures.

This file belongs to an exported checkpoint and needs nothing but torch,
transformers (with numpy, safetensors and tokenizers) and Pillow. The checkpoint
is a plain one for `AutoModelForCausalLM`; with this file the same weights see:

  path = "DIR"
  processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
  model = AutoModelForImageTextToText.from_pretrained(
    path, trust_remote_code=True
  )
  inputs = processor("what color is the shape?", images=Image.open("x.png"))
  print(processor.decode(model.generate(**inputs)))

  inputs = processor.drawing(["a blue circle"])
  pictures = processor.to_images(model.draw(**inputs, guidance=2.0))

A visual code is the id of a token (UniCode, arXiv 2403.09072). An image that is
read takes a position of the prompt for each position of its grid, where the
rows of its D codes are summed; one that is drawn is said code by code.

The visual tokenizer computes in float32. Images are [B, 3, H, W] outside, as in
PyTorch, and [B, H, W, channels] inside.
"""

from collections.abc import Mapping
import contextlib
import math
import os

import numpy as np
from PIL import Image, ImageOps
import safetensors.torch
import tokenizers
import torch
from torch import nn
from torch.nn import functional
import transformers
from transformers.utils import cached_file

WEIGHTS = "visual_tokenizer.safetensors"
TOKENIZER = "visual_text_tokenizer.json"
# Stands in a prompt for one position of an image.
IMAGE_POSITION = -1
# What `from_pretrained` passes to the hub, of its keyword arguments.
_HUB = (
  *("cache_dir", "force_download", "local_files_only", "revision"),
  *("subfolder", "token"),
)
_ROWS = 4096  # Of features that are compared with the codebook at a time.


def _hub(kwargs: Mapping) -> dict:
  """Picks what is for the hub."""
  return {key: kwargs[key] for key in _HUB if key in kwargs}


class Norm(nn.GroupNorm):
  """Group normalisation of the last axis, 16 channels a group."""

  def __init__(self, channels: int):
    super().__init__(channels // math.gcd(16, channels), channels, eps=1e-6)

  def forward(self, x):
    """Normalises [B, X, Y, C]."""
    return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Convolution(nn.Conv2d):
  """A 3x3 convolution of the last axis."""

  def __init__(self, inputs: int, outputs: int):
    super().__init__(inputs, outputs, 3, padding=1)

  def forward(self, x):
    """Maps [B, X, Y, inputs] to [B, X, Y, outputs]."""
    return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class ResidualBlock(nn.Module):
  """Two convolutions and a shortcut."""

  def __init__(self, channels: int):
    super().__init__()
    self.norm1, self.norm2 = Norm(channels), Norm(channels)
    self.conv1 = Convolution(channels, channels)
    self.conv2 = Convolution(channels, channels)

  def forward(self, x):
    """Maps [B, X, Y, C] to the same."""
    h = self.conv1(functional.silu(self.norm1(x)))
    return x + self.conv2(functional.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
  """Single-head attention over all positions."""

  def __init__(self, channels: int):
    super().__init__()
    self.norm = Norm(channels)
    self.qkv = nn.Linear(channels, 3 * channels)
    self.out = nn.Linear(channels, channels)

  def forward(self, x):
    """Maps [B, X, Y, C] to the same."""
    q, k, v = self.qkv(self.norm(x).flatten(1, 2)).chunk(3, -1)
    h = functional.scaled_dot_product_attention(q, k, v)
    return x + self.out(h).view_as(x)


class Downsample(nn.Module):
  """Makes one position of block x block."""

  def __init__(self, inputs: int, outputs: int, block: int):
    super().__init__()
    self.block = block
    self.proj = nn.Linear(inputs * block**2, outputs)

  def forward(self, x):
    """Maps [B, X, Y, C] to [B, X / block, Y / block, outputs]."""
    x = x.unflatten(2, (-1, self.block)).unflatten(1, (-1, self.block))
    return self.proj(x.transpose(2, 3).flatten(3))


class Upsample(nn.Module):
  """Makes block x block positions of one."""

  def __init__(self, inputs: int, outputs: int, block: int):
    super().__init__()
    self.block = block
    self.proj = nn.Linear(inputs, outputs * block**2)

  def forward(self, x):
    """Maps [B, X, Y, C] to [B, X * block, Y * block, outputs]."""
    x = self.proj(x).unflatten(-1, (self.block, self.block, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _blocks(channels: int, count: int, attention: bool) -> nn.Sequential:
  """Residual blocks, with attention behind the first."""
  blocks = nn.Sequential()
  for i in range(count):
    blocks.add_module(f"block{i}", ResidualBlock(channels))
    if attention and i == 0:
      blocks.add_module("attention", AttentionBlock(channels))
  return blocks


def _encoder(settings: Mapping) -> nn.Sequential:
  """Maps float32[B, H, W, 3] in [-1, 1] to features float32[B, h, w, C]."""
  widths = [settings["channels"] * m for m in settings["channel_multipliers"]]
  encoder, width = nn.Sequential(), 3
  for i, wider in enumerate(widths):
    name, block = (f"down{i}", 2) if i else ("stem", settings["stem_patch"])
    encoder.add_module(name, Downsample(width, wider, block))
    attention = settings["attention"] and i == len(widths) - 1
    blocks = _blocks(wider, settings["num_res_blocks"], attention)
    encoder.add_module(f"level{i}", blocks)
    width = wider
  encoder.add_module("norm", Norm(width))
  encoder.add_module("activation", nn.SiLU())
  encoder.add_module("head", nn.Linear(width, settings["code_dim"]))
  return encoder


def _decoder(settings: Mapping) -> nn.Sequential:
  """Maps features float32[B, h, w, C] to float32[B, H, W, 3]."""
  widths = [settings["channels"] * m for m in settings["channel_multipliers"]]
  last = len(widths) - 1
  decoder = nn.Sequential()
  decoder.add_module("stem", nn.Linear(settings["code_dim"], widths[last]))
  for i in range(last, -1, -1):
    attention = settings["attention"] and i == last
    blocks = _blocks(widths[i], settings["num_res_blocks"] + 1, attention)
    decoder.add_module(f"level{i}", blocks)
    if i:
      decoder.add_module(f"up{i}", Upsample(widths[i], widths[i - 1], 2))
  decoder.add_module("norm", Norm(widths[0]))
  decoder.add_module("activation", nn.SiLU())
  decoder.add_module("head", Upsample(widths[0], 3, settings["stem_patch"]))
  return decoder


class VisualTokenizer(nn.Module):
  """Pictures to codes and back, in float32 whatever the model is.

  A rounded encoder would choose other codes than those that the language model
  was trained on.

  Attributes:
    table: float32[K, C], what the ids stand for in the space of features.
    gain: float32[D], factor of the rows at each depth.
    valid: bool[K], ids that may be visual codes.
  """

  def __init__(self, settings: Mapping):
    """Makes the modules; weights are loaded into them.

    Args:
      settings: "unicode" of the checkpoint's `config.json`.
    """
    super().__init__()
    self.quantizer, self.depth = settings["quantizer"], settings["depth"]
    self.image_size, self.grid = settings["image_size"], settings["grid"]
    rows = settings["num_codes"]
    self.encoder, self.decoder = _encoder(settings), _decoder(settings)
    self.register_buffer("table", torch.zeros(rows, settings["code_dim"]))
    self.register_buffer("gain", torch.zeros(self.depth))
    self.register_buffer("valid", torch.zeros(rows, dtype=torch.bool))

  @property
  def num_positions(self) -> int:
    """P, positions of a picture."""
    return math.prod(self.grid)

  def _apply(self, fn, *args, **kwargs):
    """Follows the model to a device, but never to another type."""

    def move(tensor):
      return tensor.to(fn(tensor).device)

    return super()._apply(move, *args, **kwargs)

  @property
  def depth_weights(self) -> torch.Tensor:
    """What the language model weighs the rows of a position by, float32[D].

    Rows of later depths are corrections of earlier ones.
    """
    return self.gain / self.gain[0]

  def encode(self, pixels: torch.Tensor) -> torch.Tensor:
    """Quantizes pictures float32[B, 3, H, W] in [-1, 1].

    Returns:
      int64[B, P, D], ids of tokens: of the P positions, row by row.

    Raises:
      ValueError: pictures of another size.
    """
    if pixels.shape[1:] != (3, self.image_size, self.image_size):
      raise ValueError(
        f"pixels are {list(pixels.shape)}, not [B, 3, {self.image_size}, "
        f"{self.image_size}]: make them with the processor's to_pixels"
      )
    with _exact(self.gain.device):
      z = self.encoder(pixels.float().movedim(1, -1))
      total, codes = torch.zeros_like(z), []
      for d in range(self.depth):
        residual = self._region(z - total, d) / self.gain[d]
        codes.append(self._nearest(residual))
        total = total + self._spread(self.gain[d] * self.table[codes[-1]], d)
      return torch.stack(codes, -1).flatten(1, 2)

  def decode(self, codes: torch.Tensor) -> torch.Tensor:
    """Maps codes int64[B, P, D] to pictures float32[B, 3, H, W].

    They may leave [-1, 1] a little. Raises ValueError on other codes.
    """
    if codes.shape[1:] != (self.num_positions, self.depth) or (
      codes.numel() and not 0 <= codes.min() <= codes.max() < len(self.valid)
    ):
      raise ValueError(
        f"codes are {list(codes.shape)}, not [B, {self.num_positions}, "
        f"{self.depth}], or not all in 0..{len(self.valid) - 1}"
      )
    codes = codes.reshape(-1, *self.grid, self.depth)
    rows = (self.gain[d] * self.table[codes[..., d]] for d in range(self.depth))
    with _exact(self.gain.device):
      total = sum(self._spread(row, d) for d, row in enumerate(rows))
      return self.decoder(total).movedim(-1, 1)

  def _nearest(self, x):
    """Returns the nearest valid row of each [..., C], the first of equals."""
    norms = self.table.square().sum(-1)
    norms = norms.masked_fill(~self.valid, math.inf)
    found = [
      torch.argmin(torch.addmm(norms, rows, self.table.T, alpha=-2), -1)
      for rows in x.reshape(-1, x.shape[-1]).split(_ROWS)
    ]
    return torch.cat(found).view(x.shape[:-1])

  def _region(self, x, d: int):
    """Picks what depth d quantizes.

    "hq" quantizes the mean of 2 x 2 positions first, then each of the four.
    """
    if self.quantizer != "hq":
      return x
    if d == 0:
      return functional.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)
    row, column = divmod(d - 1, 2)
    return x[:, row::2, column::2]

  def _spread(self, rows, d: int):
    """Puts what depth d emits in its place."""
    if self.quantizer != "hq":
      return rows
    if d == 0:
      return rows.repeat_interleave(2, 1).repeat_interleave(2, 2)
    row, column = divmod(d - 1, 2)
    batch, height, width, dim = rows.shape
    total = rows.new_zeros(batch, 2 * height, 2 * width, dim)
    total[:, row::2, column::2] = rows
    return total


class UniCodeForConditionalGeneration(nn.Module):
  """A language model and its eyes.

  Attributes:
    config: of the language model, with "unicode".
    language_model: what `AutoModelForCausalLM` makes of the checkpoint.
    visual_tokenizer: see `VisualTokenizer`.
  """

  def __init__(self, config, language_model: nn.Module):
    super().__init__()
    self.config = config
    self.language_model = language_model
    self.visual_tokenizer = VisualTokenizer(config.unicode)

  @classmethod
  def from_pretrained(cls, path, *args, config=None, **kwargs):
    """Loads an exported checkpoint.

    Args:
      path: folder, or name on a hub.
      *args: of `AutoModelForCausalLM.from_pretrained`.
      config: as `AutoConfig` loads it; None to load it.
      **kwargs: of the same, such as dtype and device_map.

    Returns:
      The model, for inference.
    """
    hub = _hub(kwargs)
    kwargs.pop("trust_remote_code", None)
    if config is None:
      config = transformers.AutoConfig.from_pretrained(
        path, trust_remote_code=False, **hub
      )
    language_model = transformers.AutoModelForCausalLM.from_pretrained(
      path, *args, config=config, trust_remote_code=False, **kwargs
    )
    model = cls(config, language_model)
    weights = safetensors.torch.load_file(cached_file(path, WEIGHTS, **hub))
    model.visual_tokenizer.load_state_dict(weights)
    # Where the first layer of the language model is, unless it is on disk.
    device = language_model.get_input_embeddings().weight.device
    if device.type != "meta":
      model.visual_tokenizer.to(device)
    return model.eval()

  @classmethod
  def register_for_auto_class(cls, auto_class=None):
    """Called by transformers; there is nothing to remember."""

  @property
  def device(self) -> torch.device:
    """Where inputs belong."""
    return self.visual_tokenizer.gain.device

  @torch.inference_mode()
  def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns the codes of pictures: as `VisualTokenizer.encode`."""
    return self.visual_tokenizer.encode(pixel_values)

  @torch.inference_mode()
  def decode(self, codes: torch.Tensor) -> torch.Tensor:
    """Returns the pictures of codes: as `VisualTokenizer.decode`."""
    return self.visual_tokenizer.decode(codes)

  def embed(
    self,
    input_ids: torch.Tensor,
    codes: torch.Tensor | None = None,
  ) -> torch.Tensor:
    """Looks rows up; at positions of images the weighted sum of D rows.

    Args:
      input_ids: int64[B, T]; `IMAGE_POSITION` where codes belong.
      codes: int64[n, P, D] of the n images, in the order of the prompts.

    Returns:
      [B, T, E], of the language model's type.

    Raises:
      ValueError: there are more or fewer codes than positions for them.
    """
    rows = self.language_model.get_input_embeddings()
    at = input_ids == IMAGE_POSITION
    embedded = rows(input_ids.clamp(min=0))
    count = 0 if codes is None else codes.shape[0] * codes.shape[1]
    if count != int(at.sum()):
      raise ValueError(
        f"the prompts have room for {int(at.sum())} positions of images, but "
        f"{count} are given: make both with the same call of the processor"
      )
    if count:
      shifted = codes + self.config.unicode["codes_shift"]
      stacked = torch.einsum(
        "nde,d->ne",
        rows(shifted.flatten(0, 1)).float(),
        self.visual_tokenizer.depth_weights,
      )
      embedded = embedded.masked_scatter(
        at[..., None], stacked.to(embedded.dtype)
      )
    return embedded

  def forward(
    self,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    **kwargs,
  ):
    """Runs the language model on prompts that may show images.

    Args:
      input_ids: int64[B, T], of the processor.
      attention_mask: int64[B, T], 0 on padding.
      pixel_values: float32[n, 3, H, W] of the images.
      codes: int64[n, P, D], instead of their pixels.
      **kwargs: of the language model, such as labels.

    Returns:
      The language model's output.
    """
    return self.language_model(
      inputs_embeds=self._embed(input_ids, pixel_values, codes),
      attention_mask=attention_mask,
      **kwargs,
    )

  @torch.inference_mode()
  def generate(
    self,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    **kwargs,
  ) -> torch.Tensor:
    """Answers in text.

    Args:
      input_ids: as for `forward`.
      attention_mask: as for `forward`.
      pixel_values: as for `forward`.
      codes: as for `forward`.
      **kwargs: of the language model's `generate`; by default greedy, with at
        most 64 tokens.

    Returns:
      int64[B, n], new ids only.
    """
    settings = {"max_new_tokens": 64, "do_sample": False} | kwargs
    return self.language_model.generate(
      inputs_embeds=self._embed(input_ids, pixel_values, codes),
      attention_mask=attention_mask,
      suppress_tokens=self._not_text(),
      **settings,
    )

  @torch.inference_mode()
  def draw(
    self,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    unconditional_ids: torch.Tensor,
    **kwargs,
  ) -> torch.Tensor:
    """Draws pictures.

    Args:
      input_ids: as for `draw_codes`.
      attention_mask: as for `draw_codes`.
      unconditional_ids: as for `draw_codes`.
      **kwargs: of `draw_codes`: guidance (2.0), temperature (1.0), top_k (0),
        top_p (0.95) and generator.

    Returns:
      float32[B, 3, H, W], in [-1, 1] or a little outside.
    """
    return self.visual_tokenizer.decode(
      self.draw_codes(input_ids, attention_mask, unconditional_ids, **kwargs)
    )

  @torch.inference_mode()
  def draw_codes(
    self,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    unconditional_ids: torch.Tensor,
    *,
    guidance: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.95,
    generator: torch.Generator | None = None,
  ) -> torch.Tensor:
    """Says the codes of one picture each.

    Args:
      input_ids: int64[B, T], of the processor's `drawing`.
      attention_mask: int64[B, T].
      unconditional_ids: int64[U], the prompt that guidance leads away from.
      guidance: of classifier-free guidance (arXiv 2207.12598), in logits; 1 is
        off.
      temperature: divides the logits; 0 takes the likeliest code.
      top_k: only the k likeliest; 0 for all.
      top_p: only the likeliest that together have this probability.
      generator: of random numbers, on the model's device.

    Returns:
      int64[B, P, D].
    """
    eyes, shift = self.visual_tokenizer, self.config.unicode["codes_shift"]
    ids, mask = input_ids, attention_mask
    if guidance != 1:
      ids, mask = _join(ids, mask, unconditional_ids)
    rows, embedded = self.language_model.get_input_embeddings(), self.embed(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, codes = None, []
    for _ in range(eyes.num_positions * eyes.depth):
      out = self.language_model(
        inputs_embeds=embedded,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
      )
      cache, logits = out.past_key_values, out.logits[:, -1].float()
      if guidance != 1:
        given, free = logits.chunk(2)
        logits = free + guidance * (given - free)
      logits = logits[:, shift : shift + len(eyes.valid)]
      logits = logits.masked_fill(~eyes.valid, -math.inf)
      code = _choose(logits, temperature, top_k, top_p, generator)
      codes.append(code)
      said = (code + shift)[:, None]
      embedded = rows(said.repeat(len(mask) // len(said), 1))
      mask = functional.pad(mask, (0, 1), value=1)
      positions = positions[:, -1:] + 1
    codes = torch.stack(codes, 1)
    return codes.view(-1, eyes.num_positions, eyes.depth)

  def _embed(self, input_ids, pixel_values, codes):
    if codes is None and pixel_values is not None:
      with torch.no_grad():
        codes = self.visual_tokenizer.encode(pixel_values)
    return self.embed(input_ids, codes)

  def _not_text(self) -> list[int]:
    """Lists ids that no text has."""
    settings = self.config.unicode
    never = set(settings["control_ids"]) - {settings["stop_id"]}
    never |= {settings["image_start_id"], settings["image_end_id"]}
    rows = self.language_model.get_input_embeddings().num_embeddings
    return sorted(never | set(range(settings["text_vocab_size"], rows)))


@contextlib.contextmanager
def _exact(device: torch.device):
  """Switches off what rounds: autocast, and cuDNN's default of TF32."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
      stack.enter_context(
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
      )
    yield


def _join(ids, mask, unconditional):
  """Puts unconditional prompts below, all padded on the left."""
  length = max(ids.shape[1], len(unconditional))

  def left(x, size):
    return functional.pad(x, (size - x.shape[1], 0))

  below = unconditional[None].repeat(len(ids), 1)
  ids = torch.cat([left(ids, length), left(below, length)])
  mask = torch.cat(
    [left(mask, length), left(below.new_ones(below.shape), length)]
  )
  return ids, mask


def _choose(logits, temperature, top_k, top_p, generator):
  """Draws one id per row of [B, K]; ties with the last included count in."""
  if temperature == 0:
    return logits.argmax(-1)
  weights = torch.softmax(logits / temperature, -1)
  if top_k:
    lowest = weights.topk(min(top_k, weights.shape[-1])).values[:, -1:]
    weights = weights * (weights >= lowest)
    weights = weights / weights.sum(-1, keepdim=True)
  if top_p < 1:
    ordered = weights.sort(-1, descending=True).values
    kept = ordered.cumsum(-1) - ordered < top_p
    lowest = ordered.masked_fill(~kept, math.inf).min(-1, keepdim=True).values
    weights = weights * (weights >= lowest)
  return torch.multinomial(weights, 1, generator=generator)[:, 0]


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts any of Pillow's modes to RGB."""
  if image.mode.startswith(("I", "F")):  # 16 or 32 bits, one channel.
    values = np.asarray(image, np.float32)
    if image.mode == "F" and values.max(initial=0.0) <= 1:
      values = values * 255
    elif image.mode.startswith("I;16") or values.max(initial=0.0) > 255:
      values = values / 257
    values = np.nan_to_num(values).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(values).convert("RGB")
  if "A" in image.getbands() or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")


def _listed(images) -> list:
  """Returns images as a list; raises ValueError on what is none."""
  kinds = (Image.Image, str, os.PathLike)
  images = [images] if isinstance(images, kinds) else list(images)
  for image in images:
    if not isinstance(image, kinds):
      raise ValueError(
        f"an image is a {type(image).__name__}: give a PIL.Image, as by "
        "Image.fromarray, or a path"
      )
  return images


class _Shown:
  """An image in a prompt.

  Attributes:
    image: `PIL.Image`, or path.
  """

  def __init__(self, image):
    self.image = image


class UniCodeProcessor:
  """Makes prompts of texts and images, and texts and images of answers.

  Attributes:
    settings: "unicode" of the checkpoint's `config.json`.
    tokenizer: of text, none of which can become a control token.
  """

  def __init__(self, settings: Mapping, tokenizer: tokenizers.Tokenizer):
    self.settings = settings
    self.tokenizer = tokenizer
    self._control = frozenset(settings["control_ids"])

  @classmethod
  def from_pretrained(cls, path, **kwargs):
    """Loads what an exported checkpoint has of it, by folder or hub name."""
    hub = _hub(kwargs)
    config = transformers.AutoConfig.from_pretrained(
      path, trust_remote_code=False, **hub
    )
    file = cached_file(path, TOKENIZER, **hub)
    return cls(config.unicode, tokenizers.Tokenizer.from_file(file))

  @classmethod
  def register_for_auto_class(cls, auto_class="AutoProcessor"):
    """Called by transformers; there is nothing to remember."""

  def __call__(
    self, text, images=None, return_tensors: str = "pt"
  ) -> transformers.BatchFeature:
    """Makes prompts of one question each.

    Args:
      text: a question, or several.
      images: None, or one image for each question, which it is shown before: a
        `PIL.Image` or a path. Large JPEGs are read as in training only by path.
      return_tensors: "pt".

    Returns:
      "input_ids" and "attention_mask" int64[B, T], padded on the left, and
      "pixel_values" if there are images: arguments of the model.

    Raises:
      ValueError: there is another number of images than of questions, or other
        tensors are asked for.
    """
    if return_tensors != "pt":
      raise ValueError(f"return_tensors={return_tensors!r}: leave it out")
    texts = [text] if isinstance(text, str) else list(text)
    if images is not None:
      images = _listed(images)
      if len(images) != len(texts):
        raise ValueError(
          f"{len(texts)} questions have {len(images)} images: give one each, "
          "or none; apply_chat_template takes any number"
        )
    shown = [()] * len(texts)
    if images is not None:
      shown = [(_Shown(image),) for image in images]
    return self._batch([[(*i, t)] for i, t in zip(shown, texts)])

  def apply_chat_template(
    self, messages, **kwargs
  ) -> transformers.BatchFeature:
    """Makes the prompt of a conversation whose next turn is the model's.

    Args:
      messages: [{"role": "user" or "assistant", "content": text or parts}],
        users and assistants in turns, a user first and last. Parts are {"type":
        "text", "text": ...} and, of a user, {"type": "image", "image": a
        PIL.Image or its path}.
      **kwargs: `add_generation_prompt`, `tokenize` and `return_dict`, which are
        always true, and `return_tensors`, always "pt".

    Returns:
      As calling the processor.

    Raises:
      ValueError: a role, a kind of part or a keyword that is none of these.
    """
    always = {
      **dict.fromkeys(
        ("add_generation_prompt", "tokenize", "return_dict"), True
      ),
      "return_tensors": "pt",
    }
    for key, value in kwargs.items():
      if always.get(key, object()) != value:
        raise ValueError(f"{key}={value!r}: leave it out")
    turns = []
    for i, message in enumerate(messages):
      role, content = message["role"], message["content"]
      if role != ("user", "assistant")[i % 2] or not len(messages) % 2:
        raise ValueError(
          f"message {i} of {len(messages)} is of the role {role!r}: users and "
          "assistants take turns, and a user begins and ends"
        )
      if isinstance(content, str):
        content = [{"type": "text", "text": content}]
      parts = []
      for part in content:
        if part["type"] == "text":
          parts.append(part["text"])
        elif part["type"] == "image" and role == "user" and "image" in part:
          parts.append(_Shown(part["image"]))
        else:
          raise ValueError(
            f"a part of the type {part['type']!r} with {sorted(part)} has no "
            f"place in a message of the role {role!r}: use text, and images of "
            'users, as {"type": "image", "image": a PIL.Image or a path}'
          )
      turns.append(tuple(parts))
    return self._batch([turns])

  def drawing(self, captions) -> transformers.BatchFeature:
    """Makes prompts for `draw`.

    Args:
      captions: what to draw, one or several; None draws whatever comes.

    Returns:
      "input_ids", "attention_mask" and "unconditional_ids".
    """
    if captions is None or isinstance(captions, str):
      captions = [captions]
    if not captions:
      raise ValueError("there are no captions: name one, or None for any")
    free = self.settings["unconditional"]
    asked = self.settings["text_to_image"]
    questions = [
      free if caption is None else asked.replace("{}", caption)
      for caption in captions
    ]
    batch = self._batch([[(question,)] for question in questions], draw=True)
    prompt = torch.tensor(self._prompt([(free,)], draw=True))
    return transformers.BatchFeature({**batch, "unconditional_ids": prompt})

  def decode(self, ids) -> list[str]:
    """Returns the texts of answers int64[B, n]."""
    texts = []
    for row in ids.tolist():
      if self.settings["stop_id"] in row:
        row = row[: row.index(self.settings["stop_id"])]
      row = [i for i in row if i not in self._control]
      text = self.tokenizer.decode(row, skip_special_tokens=False)
      texts.append(text.strip())
    return texts

  def to_pixels(self, images) -> torch.Tensor:
    """Maps images of any size and mode to float32[B, 3, S, S] in [-1, 1].

    Turned as EXIF says, put on white where transparent, and the central square
    resized.

    Args:
      images: `PIL.Image`s or paths, one or several. Large JPEGs are read as in
        training only by path: decoded at a fraction of their size.
    """
    size = self.settings["image_size"]
    pixels = []
    for image in _listed(images):
      if not isinstance(image, Image.Image):
        image = Image.open(image)
        image.draft(None, (2 * size, 2 * size))
      image = ImageOps.fit(
        _to_rgb(ImageOps.exif_transpose(image)),
        (size, size),
        Image.Resampling.BICUBIC,
      )
      values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
      pixels.append(values.view(size, size, 3).movedim(-1, 0))
    return torch.stack(pixels).float() / 127.5 - 1.0

  def to_images(self, pixels: torch.Tensor) -> list[Image.Image]:
    """Maps float32[B, 3, S, S] in [-1, 1] to images, clipping."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [
      Image.fromarray(value.movedim(0, -1).cpu().numpy()) for value in values
    ]

  def _batch(self, conversations, draw=False) -> transformers.BatchFeature:
    """Pads prompts on the left, and gathers their images."""
    prompts = [self._prompt(turns, draw) for turns in conversations]
    length = max(map(len, prompts))
    room = [length - len(prompt) for prompt in prompts]
    batch = {
      "input_ids": [[0] * n + ids for n, ids in zip(room, prompts)],
      "attention_mask": [[0] * n + [1] * (length - n) for n in room],
    }
    batch = {key: torch.tensor(value) for key, value in batch.items()}
    images = [
      part.image
      for turns in conversations
      for parts in turns
      for part in parts
      if isinstance(part, _Shown)
    ]
    if images:
      batch["pixel_values"] = self.to_pixels(images)
    return transformers.BatchFeature(batch)

  def _prompt(self, turns, draw=False) -> list[int]:
    """Lays turns out: questions and answers alternate, a question is last.

    Pieces of text between control tokens and images are tokenised on their own,
    an answer apart from what is around it, as in training.
    """
    settings, template = self.settings, self.settings["template"]
    ids, pending = [], ""

    def flush():
      nonlocal pending
      ids.extend(self._encode(pending))
      pending = ""

    def write(pieces):
      nonlocal pending
      for piece in pieces:
        if isinstance(piece, str):
          pending += piece
          continue
        flush()
        if isinstance(piece, int):
          ids.append(piece)
        else:
          positions = [IMAGE_POSITION] * math.prod(settings["grid"])
          start, end = settings["image_start_id"], settings["image_end_id"]
          ids.extend([start, *positions, end])

    write(template["opening"])
    for i, parts in enumerate(turns):
      if i % 2:
        flush()
        write((template["prefix"], *parts))
        flush()
        write((settings["stop_id"], *template["closing"]))
      else:
        write((*template["question"], *parts, *template["answer"]))
    flush()
    return ids + [settings["image_start_id"]] * draw

  def _encode(self, text: str) -> list[int]:
    """Tokenises text; no id of it is a control token's."""
    # As text, that is. Copies of a tokenizer forget it.
    self.tokenizer.encode_special_tokens = True
    encode = self.tokenizer.encode
    ids = []
    for id_ in encode(text, add_special_tokens=False).ids if text else ():
      if id_ not in self._control:
        ids.append(id_)
        continue
      name = self.tokenizer.id_to_token(id_)  # Spelled by merges, or unknown.
      for letter in name if len(name) > 1 else ():
        pieces = encode(letter, add_special_tokens=False).ids
        ids.extend(piece for piece in pieces if piece not in self._control)
    return ids
