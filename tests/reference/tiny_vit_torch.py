"""TinyViT as LiteMedSAM and MobileSAM have it: functions on torch over an official state dict."""

import itertools

import numpy as np

from tests.support.optional import F, torch

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

    images: (B, 3, rows, columns). The state says which of the two embeddings it has.
    """
    state = {name: torch.tensor(np.asarray(array, np.float64)) for name, array in state.items()}
    x = torch.tensor(np.asarray(images, np.float64))
    with torch.no_grad():
        embedding, maps = _encode(state, x)
    return embedding.numpy(), [each.numpy() for each in maps]


def _encode(p, x):
    def conv(name, x, stride=1):
        kernel = p[f"{name}.c.weight"]
        groups = x.shape[1] if kernel.shape[1] == 1 and x.shape[1] > 1 else 1
        x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, 1, groups)
        statistics = (p[f"{name}.bn.running_mean"], p[f"{name}.bn.running_var"])
        return F.batch_norm(x, *statistics, p[f"{name}.bn.weight"], p[f"{name}.bn.bias"], eps=1e-5)

    def linear(name, x):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name, x, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def bottleneck(name, x, stride=1):
        hidden = F.gelu(conv(f"{name}.conv2", F.gelu(conv(f"{name}.conv1", x)), stride))
        return conv(f"{name}.conv3", hidden)

    def attention(name, x, heads, window):
        """x (B, H, W, D): padded with zeros to whole windows, then normalized, padding and all."""
        b, h, w, d = x.shape
        x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))
        table, out = p[f"{name}.attention_biases"], torch.zeros_like(x)
        y, z = np.divmod(np.arange(window**2), window)
        entry = np.abs(y[:, None] - y) * window + np.abs(z[:, None] - z)
        for top in range(0, x.shape[1], window):
            for left in range(0, x.shape[2], window):
                place = (slice(None), slice(top, top + window), slice(left, left + window))
                tokens = linear(f"{name}.qkv", norm(f"{name}.norm", x[place].reshape(b, -1, d)))
                q, k, v = tokens.reshape(b, window**2, heads, 3, -1).permute(3, 0, 2, 1, 4)
                scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + table[:, entry]
                mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, window**2, d)
                out[place] = linear(f"{name}.proj", mixed).reshape(b, window, window, d)
        return out[:, :h, :w]

    head, maps = "image_encoder", []
    stride = 1 if p[f"{head}.patch_embed.seq.0.c.weight"].shape[-1] == 1 else 2
    x = conv(f"{head}.patch_embed.seq.0", x, stride)
    x = conv(f"{head}.patch_embed.seq.2", F.gelu(x), stride)
    for i in range(4):
        for j in itertools.count():
            if not any(name.startswith(f"{head}.layers.{i}.blocks.{j}.") for name in p):
                break
            name = f"{head}.layers.{i}.blocks.{j}"
            if i == 0:
                x = F.gelu(x + bottleneck(name, x))
                continue
            x = x.permute(0, 2, 3, 1)
            x = x + attention(f"{name}.attn", x, HEADS[i], WINDOWS[i])
            x = conv(f"{name}.local_conv", x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.mlp.norm", x)))
            x = (x + linear(f"{name}.mlp.fc2", hidden)).permute(0, 3, 1, 2)
        if i >= 2:
            maps.append(x)
        if i < 3:
            x = bottleneck(f"{head}.layers.{i}.downsample", x, (2, 2, 1)[i])
        if i in (1, 2):
            maps.append(x)

    def channel_norm(name, x):
        return norm(name, x.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)

    x = channel_norm(f"{head}.neck.1", F.conv2d(x, p[f"{head}.neck.0.weight"]))
    return channel_norm(f"{head}.neck.3", F.conv2d(x, p[f"{head}.neck.2.weight"], padding=1)), maps
