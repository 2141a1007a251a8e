"""Segment Anything for points, boxes and masks: `pgpsam_jax.SamPredictor`.

Letters: h w original image, H W token grid, B prompts, P points, M masks. Coordinates are pixels
(x, y) of the original image, (0, 0) the center of its top left pixel. Source: Kirillov et al. 2023.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam.sam import Sam, SamConfig, postprocess, preprocess
from pgpsam_jax.models.sam.weights import (
    MASK_TOKENS,
    Base,
    TrainedFor,
    fit_base,
    load_base,
    select_base,
)

THRESHOLD = 0.0  # logits above it are in the mask

_postprocess = jax.jit(postprocess, static_argnums=(1, 2, 3))


class SamMasks(NamedTuple):
    """What `SamPredictor.predict` returns, as NumPy arrays; a leading B if prompts are batched.

    masks: (M, h, w) bool, or float32 logits with `return_logits`.
    scores: (M,) float32, the IoU with the truth that the model predicts for each mask.
    low_res_logits: (M, 4H, 4W) float32 over the padded input; one of them is a `mask_input`.
    """

    masks: np.ndarray
    scores: np.ndarray
    low_res_logits: np.ndarray


class SamPredictor:
    """Encodes an image once, then predicts masks for any number of prompts.

    The encoder is compiled once, the decoder once per kind and number of prompts, the resize to
    the original image once per image size.
    """

    def __init__(
        self, model: Sam, *, colors: str = "normalized", mask_tokens: tuple[int, ...] = MASK_TOKENS
    ):
        """Wraps a model with its weights, which stay where they are.

        Args:
          model: for images that are normalized already (`EncoderConfig.colors` is "unit").
          colors: what its encoder was trained on: "normalized" by the pixel mean and standard
            deviation of SAM, or "unit", from 0 to 1.
          mask_tokens: those that were trained: 0 for the single mask, 1 to 3 for three masks.
        """
        if model.image_encoder.config.colors != "unit":
            raise ValueError("the encoder normalizes again; build it with colors='unit'")
        self.image_size = model.prompt_encoder.image_size
        self._grid, self._colors = model.prompt_encoder.grid, colors
        self._mask_tokens = mask_tokens
        self._embedding: jax.Array | None = None
        graphdef, state = nnx.split(model)

        def encode(state, images):
            return nnx.merge(graphdef, state).encode_image(images)

        def decode(state, embedding, prompts, multimask):
            return nnx.merge(graphdef, state).predict(embedding, multimask=multimask, **prompts)

        self._encode = functools.partial(jax.jit(encode), state)
        self._decode = functools.partial(jax.jit(decode, static_argnums=3), state)

    @classmethod
    def from_pretrained(
        cls, path, encoder: str | None = None, *, image_size: int | None = None, dtype=jnp.float32
    ) -> "SamPredictor":
        """Loads weights that `weights_conversion.convert` wrote.

        Args:
          path: `<stem>`, `<stem>.safetensors` or `<stem>.json`.
          encoder: "vit_b", "vit_l", "vit_h" or "tiny_vit"; None for that of the weights.
          image_size: side of the model's square input in pixels; None for that of the weights
            (1024 in SAM). Position tables are resized to any other.
          dtype: of the computation, float32 or bfloat16; weights and logits are float32.

        Raises:
          UserError: a file is missing or damaged, or of another encoder.
        """
        if Path(path).suffix in (".pth", ".pt"):
            raise UserError(
                f"{path} is not converted; run pgpsam convert "
                f"--source {path} --output {Path(path).with_suffix('')} and give the output"
            )
        base, trained = load_base(path), TrainedFor.of(path)
        if encoder and trained.encoder not in (None, encoder):
            raise UserError(
                f"{path} has the encoder {trained.encoder}, not {encoder}; leave it out or "
                "give other weights"
            )
        model = _load(base, encoder or base.meta["variant"], image_size, dtype)
        return cls(model, colors=trained.colors, mask_tokens=trained.mask_tokens)

    def set_image(self, image) -> None:
        """Encodes the image that the following calls of `predict` are about.

        Args:
          image: (h, w) gray or (h, w, 3) RGB; uint8 from 0 to 255, or float from 0 to 1.

        Raises:
          ValueError: another shape, type or range.
        """
        image = _rgb(image)
        inputs, self._resized = preprocess(image, self.image_size, self._colors)
        self._original = image.shape[:2]
        self._embedding = self._encode(inputs)

    @property
    def embedding(self) -> jax.Array:
        """The encoder's output for the image, (1, H, W, C)."""
        if self._embedding is None:
            raise ValueError("no image is set; call set_image first")
        return self._embedding

    def predict(
        self,
        *,
        points=None,
        labels=None,
        box=None,
        mask_input=None,
        multimask: bool | None = None,
        return_logits: bool = False,
    ) -> SamMasks:
        """Predicts masks for one prompt, or for B prompts about the same image at once.

        A prompt is any combination of points, a box and a mask. With a leading B in all that are
        given, there are B prompts, and so many results.

        Args:
          points: (P, 2) or (B, P, 2), pixels (x, y).
          labels: (P,) or (B, P), one per point: 1 foreground, 0 background, -1 no point (fills up
            rows of fewer points).
          box: (4,) or (B, 4), pixels (x0, y0, x1, y1).
          mask_input: (4H, 4W), (1, 4H, 4W) or (B, 4H, 4W), logits over the padded input:
            `low_res_logits` of an earlier call.
          multimask: whether to return the three masks of an ambiguous prompt, M = 3, instead of
            one; by default three, if they were trained.
          return_logits: whether `masks` are logits at the original size instead of bool.

        Raises:
          ValueError: no image is set, prompts do not fit together or lie outside the image, or the
            masks were not trained.
        """
        embedding, multimask = self.embedding, self._masks(multimask)
        prompts, batched = self._prompts(points, labels, box, mask_input)
        logits, scores = self._decode(embedding, prompts, multimask)
        masks = _postprocess(logits, self.image_size, self._resized, self._original)
        masks = masks if return_logits else masks > THRESHOLD
        masks, scores, logits = jax.device_get((masks, scores, logits))
        result = SamMasks(np.moveaxis(masks, -1, 1), scores, np.moveaxis(logits, -1, 1))
        return result if batched else SamMasks(*(x[0] for x in result))

    def _masks(self, multimask: bool | None) -> bool:
        """Whether to return three masks; refuses masks that would be noise."""
        three = {1, 2, 3} <= set(self._mask_tokens)
        multimask = three if multimask is None else multimask
        if not (three if multimask else 0 in self._mask_tokens):
            raise ValueError(
                f"multimask={multimask} needs mask token {'1 to 3' if multimask else '0'}, but of "
                f"these weights {', '.join(map(str, self._mask_tokens))} was trained; set "
                f"multimask={not multimask}"
            )
        return multimask

    def _prompts(self, points, labels, box, mask_input):
        """Arguments of `PromptEncoder` in its own pixels, and whether a leading B was given."""
        if (points is None) != (labels is None):
            raise ValueError("points and labels belong together; give both or neither")
        given: dict[str, np.ndarray] = {}
        batched = False
        if points is not None:
            points, batched = _array("points", points, "P", 2)
            labels, _ = _array("labels", labels, "P")
            if labels.shape != points.shape[:-1]:
                raise ValueError("points and labels differ in number; give one label per point")
            if not np.isin(labels, (-1, 0, 1)).all():
                raise ValueError("a label is 1 (foreground), 0 (background) or -1 (no point)")
            self._check_inside("point", points[labels >= 0])
            given |= dict(points=self._to_input(points), labels=labels)
        if box is not None:
            box, several = _array("box", box, 4)
            corners, batched = box.reshape(-1, 2, 2), batched or several
            self._check_inside("corner of a box", corners)
            if (corners[:, 0] > corners[:, 1]).any():
                raise ValueError("a box is (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1")
            given["boxes"] = self._to_input(corners).reshape(box.shape)
        if mask_input is not None:
            masks, _ = _array("mask_input", mask_input, *(4 * n for n in self._grid))
            given["masks"], batched = masks[..., None], batched or len(masks) > 1
        if len({len(x) for x in given.values()}) > 1:
            raise ValueError("prompts differ in number; give all of them one leading B, or none")
        return {name: x.astype(np.float32) for name, x in given.items()}, batched

    def _to_input(self, pixels):
        """Pixels (..., 2) of the original image to those of the resized one."""
        return pixels * np.divide(self._resized[::-1], self._original[::-1])

    def _check_inside(self, what: str, pixels) -> None:
        h, w = self._original
        outside = ~((pixels >= 0) & (pixels <= (w, h))).all(axis=-1)  # NaN is outside, too
        if outside.any():
            x, y = pixels[outside][0]
            raise ValueError(
                f"{what} ({x:g}, {y:g}) lies outside the image of {w} x {h} pixels; give (x, y) in "
                "pixels of the original image, clipped to it"
            )


def _rgb(image) -> np.ndarray:
    """An image as `preprocess` takes it: (h, w, 3), uint8 or float32 from 0 to 255."""
    image = np.asarray(image)
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
        raise ValueError(f"the image has shape {image.shape}; give (h, w) gray or (h, w, 3) RGB")
    if image.dtype.kind == "f":
        if not (image.min() >= 0 and image.max() <= 1):  # NaN neither
            raise ValueError("a float image has values outside [0, 1]; rescale it, or give uint8")
        image = 255 * image.astype(np.float32)
    elif image.dtype != np.uint8:
        raise ValueError(f"the image has type {image.dtype}; give uint8, or float from 0 to 1")
    return np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image


def _array(what: str, value, *axes) -> tuple[np.ndarray, bool]:
    """A float64 array (B, *axes), and whether it had the B; axis "P" is of any length."""
    array = np.asarray(value, np.float64)
    batched = array.ndim == len(axes) + 1
    array = array if batched else array[None]
    if array.ndim != len(axes) + 1 or any(
        n not in ("P", m) for n, m in zip(axes, array.shape[1:], strict=True)
    ):
        shape = ", ".join(map(str, axes))
        raise ValueError(f"{what} has shape {np.shape(value)}; give ({shape}) or (B, {shape})")
    return array, batched


def _load(base: Base, encoder: str, image_size: int | None, dtype) -> Sam:
    """A SAM with converted weights, fitted to the image size."""
    config = SamConfig.preset(
        encoder, image_size or base.meta["image_size"], base.meta["patch_size"]
    )
    model = nnx.eval_shape(lambda: Sam(config, dtype=dtype, rngs=ShapeOnlyRngs()))
    graphdef, state = nnx.split(model)
    leaves, sizes = flat_paths(state), config.encoder
    tensors = fit_base(base.tensors, sizes.grid, global_blocks=sizes.global_blocks)
    tensors = select_base(tensors, {path: leaf.shape for path, leaf in leaves.items()})
    for path, leaf in leaves.items():
        leaf.set_value(jnp.asarray(tensors[path]))
    return nnx.merge(graphdef, state)
