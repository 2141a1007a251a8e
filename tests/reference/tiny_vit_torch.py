"""TinyViT in PyTorch, in float64, over an official state dict of LiteMedSAM or MobileSAM."""

import numpy as np

from tests.support.optional import OptionalModule, torch

tiny_vit_torch = OptionalModule("experiments.benchmark.tiny_vit_torch")

WIDTHS = (64, 128, 160, 320)
HEADS, WINDOWS = (0, 4, 5, 10), (0, 7, 14, 7)


def random_state(lite: bool, depths=(2, 2, 6, 2), seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by their official names; batch statistics and biases are no trivial ones."""
    rng, state = np.random.default_rng(seed), {}

    def put(name, *shape, spread=None, base=0.0):
        spread = float(np.prod(shape[1:])) ** -0.5 if spread is None else spread
        state[name] = (base + spread * rng.standard_normal(shape)).astype(np.float32)

    def conv(name, out, dim, size):
        put(f"{name}.c.weight", out, dim, size, size)
        put(f"{name}.bn.weight", out, spread=0.1, base=1.0)
        put(f"{name}.bn.bias", out, spread=0.1)
        put(f"{name}.bn.running_mean", out, spread=0.1)
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 2, out).astype(np.float32)
        state[f"{name}.bn.num_batches_tracked"] = np.array(7)

    def linear(name, out, dim):
        put(f"{name}.weight", out, dim)
        put(f"{name}.bias", out, spread=0.1)

    def norm(name, dim):
        put(f"{name}.weight", dim, spread=0.1, base=1.0)
        put(f"{name}.bias", dim, spread=0.1)

    head = "image_encoder"
    size = 1 if lite else 3
    conv(f"{head}.patch_embed.seq.0", 32, 3, size)
    conv(f"{head}.patch_embed.seq.2", 64, 32, size)
    for i, dim in enumerate(WIDTHS):
        for j in range(depths[i]):
            block = f"{head}.layers.{i}.blocks.{j}"
            if i == 0:
                conv(f"{block}.conv1", 4 * dim, dim, 1)
                conv(f"{block}.conv2", 4 * dim, 1, 3)
                conv(f"{block}.conv3", dim, 4 * dim, 1)
                continue
            put(f"{block}.attn.attention_biases", HEADS[i], WINDOWS[i] ** 2, spread=1.0)
            norm(f"{block}.attn.norm", dim)
            linear(f"{block}.attn.qkv", 3 * dim, dim)
            linear(f"{block}.attn.proj", dim, dim)
            norm(f"{block}.mlp.norm", dim)
            linear(f"{block}.mlp.fc1", 4 * dim, dim)
            linear(f"{block}.mlp.fc2", dim, 4 * dim)
            conv(f"{block}.local_conv", dim, 1, 3)
        if i < 3:
            merge, out = f"{head}.layers.{i}.downsample", WIDTHS[i + 1]
            conv(f"{merge}.conv1", out, dim, 1)
            conv(f"{merge}.conv2", out, 1, 3)
            conv(f"{merge}.conv3", out, out, 1)
    put(f"{head}.neck.0.weight", 256, 320, 1, 1)
    norm(f"{head}.neck.1", 256)
    put(f"{head}.neck.2.weight", 256, 256, 3, 3)
    norm(f"{head}.neck.3", 256)
    return state


def encode(state: dict[str, np.ndarray], images: np.ndarray):
    """Embedding (B, 256, H, W) and the four maps on the output's grid, all float64.

    images: (B, 3, rows, columns). The state says which of the two embeddings it has, and depths.
    """
    head = "image_encoder."
    state = {
        name.removeprefix(head): torch.tensor(np.asarray(array, np.float64))
        for name, array in state.items()
        if not name.endswith("num_batches_tracked")
    }
    sizes = {
        "patch_size": {1: 4, 3: 16}[state["patch_embed.seq.0.c.weight"].shape[-1]],
        "widths": WIDTHS,
        "depths": [
            len({name.split(".")[3] for name in state if name.startswith(f"layers.{i}.blocks.")})
            for i in range(len(WIDTHS))
        ],
        "head_counts": HEADS,
        "windows": WINDOWS,
        "expansion": 4,
        "out_channels": 256,
    }
    with torch.no_grad():
        model = tiny_vit_torch.TinyVit(sizes).double()
        model.load_state_dict(state, strict=True)
        embedding, maps = model.maps(torch.tensor(np.asarray(images, np.float64)))
    return embedding.numpy(), [each.numpy() for each in maps]
