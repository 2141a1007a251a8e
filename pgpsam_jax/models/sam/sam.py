"""Segment Anything, whole: presets, module, and the image pre- and post-processing around it.

Letters: B prompts, H W token grid, C channels. Source: Kirillov et al. 2023.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.image_encoder import EncoderConfig, normalize
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.mask_decoder import DecoderConfig, MaskDecoder
from pgpsam_jax.models.sam.prompt_encoder import PromptEncoder
from pgpsam_jax.models.sam.tiny_vit import TinyVitConfig
from pgpsam_jax.models.sam.weights import COLORS

_ENCODERS = {
    "vit_b": (EncoderConfig, dict(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11))),
    "vit_l": (EncoderConfig, dict(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))),
    "vit_h": (EncoderConfig, dict(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))),
    # Small enough to train from scratch on two CPU cores: tests and the phantom.
    "vit_t": (
        EncoderConfig,
        dict(width=96, depth=4, heads=3, global_blocks=(1, 3), window_size=8, out_channels=64),
    ),
    "tiny_vit": (TinyVitConfig, {}),  # LiteMedSAM at patch size 4, MobileSAM at 16
}


Encoder = EncoderConfig | TinyVitConfig


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM: encoder, decoder and the input it is built for (pixels, rows x columns)."""

    image_size: tuple[int, int]
    encoder: Encoder
    decoder: DecoderConfig

    @classmethod
    def preset(cls, name: str, image_size=1024, patch_size: int = 16, **encoder):
        """Returns the sizes of an encoder of that name at a square size or (rows, columns)."""
        if name not in _ENCODERS:
            raise UserError(f"unknown SAM encoder {name!r}; choose one of {', '.join(_ENCODERS)}")
        if (colors := encoder.get("colors", "unit")) not in COLORS:
            raise UserError(
                f"model.colors {colors!r} unknown; choose auto or {' or '.join(COLORS)}"
            )
        size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
        if any(s <= 0 or s % patch_size for s in size):
            raise UserError(
                f"image size {image_size} is not divisible by the patch size {patch_size}; "
                f"choose a multiple of {patch_size}"
            )
        grid = (size[0] // patch_size, size[1] // patch_size)
        kind, preset = _ENCODERS[name]
        sizes = kind(grid=grid, patch_size=patch_size, **{**preset, **encoder})
        width = sizes.out_channels
        return cls(size, sizes, DecoderConfig(width=width, mlp_dim=8 * width))


class Sam(nnx.Module):
    """The complete promptable model; `encode_image` once, then `predict` for any prompts."""

    def __init__(
        self,
        config: SamConfig,
        *,
        lora: LoraConfig | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.image_encoder = config.encoder.make(lora, dtype=dtype, rngs=rngs)
        self.prompt_encoder = PromptEncoder(
            config.decoder.width, config.encoder.grid, config.image_size, dtype=dtype, rngs=rngs
        )
        self.mask_decoder = MaskDecoder(config.decoder, 4, iou_head=True, dtype=dtype, rngs=rngs)

    def encode_image(self, images):
        """Images (B, rows, columns, 3) to embeddings (B, H, W, C): normalized by `preprocess`, or
        in [0, 1] for an encoder that normalizes them itself (`EncoderConfig.colors`)."""
        return self.image_encoder(images)[0]

    def predict(self, embedding, *, multimask: bool = True, **prompts):
        """Low-resolution logits (B, 4H, 4W, M) and IoU (B, M) for prompts of `PromptEncoder`.

        `embedding` is (1, H, W, C), one image for all prompts, or (B, H, W, C).
        """
        sparse, dense = self.prompt_encoder(batch=embedding.shape[0], **prompts)
        grid = self.prompt_encoder.pe_layer.grid(self.prompt_encoder.grid)
        return self.mask_decoder(embedding, grid, sparse, dense, multimask=multimask)


def preprocess(image: np.ndarray, size: tuple[int, int], colors: str = "normalized"):
    """Resizes, normalizes and pads an image as Segment Anything does.

    The longer side is scaled to fit (bilinear, with antialiasing where it shrinks), which rounds
    uint8 images to whole levels and float images not at all. Colors are then normalized, and
    zeros are added at the bottom and at the right.

    Args:
      image: (h, w, 3) RGB, uint8 or float32, both from 0 to 255.
      size: rows and columns of the model's input.
      colors: what the encoder was trained on, one of `weights.COLORS`.

    Returns:
      The input (1, *size, 3) float32, and (rows, columns) of the resized image within it.
    """
    from PIL import Image  # what the official code resizes with; training needs none of it

    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    rows, columns = shape = tuple(max(1, int(n * scale + 0.5)) for n in image.shape[:2])
    out = np.zeros((1, *size, 3), np.float32)
    for channel in range(3):
        plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
        plane = plane.resize((columns, rows), Image.Resampling.BILINEAR)
        out[0, :rows, :columns, channel] = np.asarray(plane)
    inside = out[0, :rows, :columns]
    inside[...] = normalize(inside) if colors == "normalized" else inside / 255
    return out, shape


def postprocess(logits, size: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]):
    """Resizes low-resolution logits (B, h, w, M) to the original image, (B, *original, M).

    Bilinear to the input size, without the padding, then to the original size; no antialiasing.

    Args:
      logits: the decoder's, over the whole input.
      size, resized: as given to and returned by `preprocess`.
      original: rows and columns of the image.
    """
    batch, *_, masks = logits.shape
    logits = jax.image.resize(logits, (batch, *size, masks), "bilinear", antialias=False)
    logits = logits[:, : resized[0], : resized[1]]
    return jax.image.resize(logits, (batch, *original, masks), "bilinear", antialias=False)
