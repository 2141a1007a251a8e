"""SAM's mask decoder (Kirillov et al., appendix A) in plain float64 numpy, no batch axis.

The second half of the oracle of `test_pgpsam.py`; `p` maps dotted parameter names to arrays, as in
`equations_numpy`.
"""

import numpy as np

from tests.reference.equations_numpy import gelu, layer_norm, linear, softmax, sub

TOKEN_EPS = 1e-5  # layer norms of tokens; those of maps have 1e-6


def fourier_positions(matrix, grid):
    """Random Fourier code of each cell center, (H, W, C): sin and cos of 2 pi (2 (x, y) - 1) G."""
    h, w = grid
    out = np.zeros((h, w, 2 * matrix.shape[1]))
    for i in range(h):
        for j in range(w):
            angles = 2 * np.pi * (np.array([2 * (j + 0.5) / w - 1, 2 * (i + 0.5) / h - 1]) @ matrix)
            out[i, j] = np.concatenate([np.sin(angles), np.cos(angles)])
    return out


def attention(q, k, v, p, heads):
    """Multi-head attention of tokens q on k and v, one head and one query at a time."""
    q, k, v = (linear(x, sub(p, f"{n}_proj")) for x, n in ((q, "q"), (k, "k"), (v, "v")))
    size = q.shape[-1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        for t in range(len(q)):
            out[t, at] = softmax(k[:, at] @ q[t, at] / np.sqrt(size)) @ v[:, at]
    return linear(out, sub(p, "out_proj"))


def transformer(image, image_pe, prompt, p, depth, heads):
    """Two-way transformer: tokens (T, D) and image (L, D) after `depth` blocks and the last look.

    The first block's self-attention has neither positions nor a residual.
    """
    tokens = prompt
    for i in range(depth):
        block = sub(p, f"layers.{i}")

        def attend(name, *qkv, block=block):
            return attention(*qkv, sub(block, name), heads)

        def norm(x, n, block=block):
            return layer_norm(x, sub(block, f"norm{n}"), TOKEN_EPS)

        if i == 0:
            tokens = attend("self_attn", tokens, tokens, tokens)
        else:
            q = tokens + prompt
            tokens = tokens + attend("self_attn", q, q, tokens)
        tokens = norm(tokens, 1)
        look = attend("cross_attn_token_to_image", tokens + prompt, image + image_pe, image)
        tokens = norm(tokens + look, 2)
        hidden = np.maximum(linear(tokens, sub(block, "mlp.lin1")), 0)
        tokens = norm(tokens + linear(hidden, sub(block, "mlp.lin2")), 3)
        look = attend("cross_attn_image_to_token", image + image_pe, tokens + prompt, tokens)
        image = norm(image + look, 4)
    last = sub(p, "final_attn_token_to_image")
    tokens = tokens + attention(tokens + prompt, image + image_pe, image, last, heads)
    return layer_norm(tokens, sub(p, "norm_final_attn"), TOKEN_EPS), image


def upsample_2x(x, p):
    """Transposed 2x2 convolution of stride 2: each pixel becomes a 2x2 patch of its own."""
    h, w, _ = x.shape
    out = np.zeros((2 * h, 2 * w, p["kernel"].shape[-1]))
    for i in range(2 * h):
        for j in range(2 * w):
            out[i, j] = x[i // 2, j // 2] @ p["kernel"][:, i % 2, j % 2] + p["bias"]
    return out


def masks(mask_tokens, image_tokens, p, refine=None):
    """Logits (4H, 4W, M): each token's MLP gives the weights of a sum over the upscaled map.

    refine: two functions of the maps (2H, 2W, D/4) and (4H, 4W, D/8), or None.
    """
    up = sub(p, "upscaling")
    x = upsample_2x(image_tokens, sub(up, "conv1"))
    x = gelu(layer_norm(refine[0](x) if refine else x, sub(up, "norm")))
    x = upsample_2x(x, sub(up, "conv2"))
    x = gelu(refine[1](x) if refine else x)
    out = np.zeros((*x.shape[:2], len(mask_tokens)))
    for m, token in enumerate(mask_tokens):
        for i in range(3):
            layer = sub(p, f"hyper_mlps.layers.{i}")
            token = token @ layer["kernel"][m] + layer["bias"][m]
            token = np.maximum(token, 0) if i < 2 else token
        out[..., m] = x @ token
    return out


def decode(feature, sparse, dense, image_pe, p, depth, heads, refine=None):
    """One pass: logits (4H, 4W, M), mask tokens (M, D) and image tokens (H, W, D)."""
    own = p["mask_tokens"]
    image, pe = (x.reshape(-1, x.shape[-1]) for x in (feature + dense, image_pe))
    prompt = np.concatenate([own, sparse])
    tokens, image = transformer(image, pe, prompt, sub(p, "transformer"), depth, heads)
    tokens, image = tokens[: len(own)], image.reshape(feature.shape)
    return masks(tokens, image, p, refine), tokens, image
