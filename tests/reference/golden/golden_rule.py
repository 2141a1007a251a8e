"""Weights, image and labels of the small golden set: each a function of its name, never stored.

Uniform draws, scaled so that activations neither vanish nor grow and every gain has an effect.
"""

import zlib

import numpy as np

GAINS = ("alpha", "beta", "inter", "intra")
EMBEDDINGS = ("prototypes", "_embed", "_token", "_tokens", "level_image", "level_mask")
SUMMED = ("linear1", "linear2")  # their inputs are sums over all pixels, not means


def _draws(name: str, shape, seed: int):
    """Independent draws of mean 0 and variance 1."""
    # Of twelve offsets tried, 2 keeps the activations farthest from the kinks of LeakyReLU, ReLU
    # and bilinear sampling: rounding moves the gradients least.
    rng = np.random.default_rng(zlib.crc32(f"{name} {seed + 2}".encode()))
    return rng.uniform(-np.sqrt(3), np.sqrt(3), tuple(shape))


def tensor(name: str, shape, seed: int = 0) -> np.ndarray:
    """Float32 array for a tensor of this name in PyTorch's layout."""
    module, _, kind = name.rpartition(".")
    mean, deviation = 0.0, 0.1  # biases
    if kind in GAINS:
        mean, deviation = 1.0, 0.3
    elif "rel_pos" in kind or kind == "pos_embed":
        deviation = 0.2
    elif kind == "weight" and module.endswith(EMBEDDINGS):
        deviation = 1.0
    elif kind == "weight" and len(shape) == 1:  # of a layer norm
        mean = 1.0
    elif len(shape) > 1:
        transposed = module.endswith("up_sample")  # (in, out, 2, 2), each output sees one pixel
        deviation = (shape[0] if transposed else np.prod(shape[1:])) ** -0.5
        if module.endswith(SUMMED):
            deviation *= 0.2
    return (mean + deviation * _draws(name, shape, seed)).astype(np.float32)


def image(batch: int, size: int, seed: int = 0) -> np.ndarray:
    """(batch, 3, size, size) float32 in [0, 1], three equal channels: waves and a little noise."""
    y, x = np.mgrid[:size, :size] / size
    gray = np.zeros((batch, size, size))
    for i in range(batch):
        for j in range(4):
            u, v, phase = _draws(f"image wave {i} {j}", (3,), seed)
            gray[i] += np.sin(2 * np.pi * (2 * u * x + 2 * v * y) + phase)
    gray = 0.5 + 0.1 * gray + 0.05 * _draws("image noise", gray.shape, seed)
    return np.repeat(np.clip(gray, 0, 1)[:, None], 3, axis=1).astype(np.float32)


def labels(batch: int, size: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """(batch, size, size) int32: one disc for each class on background, later ones on top."""
    y, x = np.mgrid[:size, :size] / size
    out = np.zeros((batch, size, size), np.int32)
    for i in range(batch):
        for k in range(1, num_classes):
            u, v, r = 0.5 + 0.2 * _draws(f"labels {i} {k}", (3,), seed)
            out[i][(x - u) ** 2 + (y - v) ** 2 < (0.3 * r) ** 2] = k
    return out
