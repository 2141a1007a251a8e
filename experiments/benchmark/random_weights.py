"""Deterministic random SAM for both frameworks: tensors by `transformers.SamModel` name, and LoRA.

A tensor depends on its name, shape and nothing else, so two processes draw the same model.
"""

import re
import zlib

import numpy as np

RANK = 4
TARGETS = ("q", "v")
CLASSES = 3
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


def sam_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns float32 tensors of these names that preserve the scale of activations."""
    return {name: _draw(name, shape) for name, shape in shapes.items()}


def lora_tensors(name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns A (targets, D, r) and a nonzero B (targets, r, D) of a block: A has a gradient.

    A block is what the numbers in a name of something within it say, in either framework.
    """
    count, block = len(TARGETS), " ".join(re.findall(r"\d+", name))
    a = _normal(f"lora a {block}", (count, width, RANK)) / np.float32(width**0.5)
    b = _normal(f"lora b {block}", (count, RANK, width)) / np.float32(RANK**0.5)
    return a, np.float32(0.1) * b


def _draw(name: str, shape) -> np.ndarray:
    if name.endswith("shared_embedding.positional_embedding"):  # a second name of one tensor
        name = "shared_image_embedding.positional_embedding"
    values = _normal(name, shape)
    if name.endswith("running_var"):
        return 1 + np.float32(0.1) * np.abs(values)
    if len(shape) == 1 and name.endswith("weight"):  # of a norm
        return 1 + np.float32(0.1) * values
    if len(shape) == 1 or re.search("rel_pos|pos_embed|attention_biases", name):
        return np.float32(0.1) * values
    if name.startswith("vision_encoder.") or "upscale" in name or "proj" in name or "lin" in name:
        return values / np.float32(np.sqrt(np.prod(shape[1:])))
    return values


def _normal(name: str, shape) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def batch(batch_size: int, image_size: int, classes: int, *, channels: bool):
    """Returns images (B, S, S) or (B, S, S, 3) float32 in [0, 1) and labels (B, S, S) int32."""
    rng = np.random.default_rng(0)
    shape = (batch_size, image_size, image_size)
    images = rng.random(shape + (3,) * channels, np.float32)
    return images, rng.integers(0, classes, shape, np.int32)
