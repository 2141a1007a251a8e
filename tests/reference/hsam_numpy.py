"""H-SAM's two decoders in plain float64 numpy, no batch axis: the oracle of `test_hsam.py`.

Written from the description of the authors' code. `p` maps dotted parameter names to arrays, as in
`equations_numpy`. Legend: H W grid, L = H*W, D width, K classes.
"""

import numpy as np

from tests.reference.decoder_numpy import TOKEN_EPS, upsample_2x
from tests.reference.equations_numpy import gelu, layer_norm, linear, softmax, sub
from tests.reference.release_numpy import resize


def attention(q, k, v, p, heads, gate=None):
    """Attention whose weights are multiplied by gate (T, L) after the softmax."""
    q, k, v = (linear(x, sub(p, f"{n}_proj")) for x, n in ((q, "q"), (k, "k"), (v, "v")))
    size, out = q.shape[-1] // heads, np.zeros_like(q)
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        for t in range(len(q)):
            weights = softmax(k[:, at] @ q[t, at] / np.sqrt(size))
            out[t, at] = (weights if gate is None else weights * gate[t]) @ v[:, at]
    return linear(out, sub(p, "out_proj"))


def transformer(image, pe, prompt, p, depth, heads, gate=None):
    """Tokens (T, D) and image (L, D): the tokens look at the image first, then at each other."""
    tokens, to_tokens = prompt, None if gate is None else gate.T
    for i in range(depth):
        block = sub(p, f"layers.{i}")
        look, own, back = (
            sub(block, name)
            for name in ("cross_attn_token_to_image", "self_attn", "cross_attn_image_to_token")
        )
        update = attention(tokens + prompt, image + pe, image, look, heads, to_tokens)
        tokens = layer_norm(tokens + update, sub(block, "norm2"), TOKEN_EPS)
        if i == 0:
            tokens = attention(tokens, tokens, tokens, own, heads)
        else:
            q = tokens + prompt
            tokens = tokens + attention(q, q, tokens, own, heads)
        tokens = layer_norm(tokens, sub(block, "norm1"), TOKEN_EPS)
        hidden = np.maximum(linear(tokens, sub(block, "mlp.lin1")), 0)
        tokens = tokens + linear(hidden, sub(block, "mlp.lin2"))
        tokens = layer_norm(tokens, sub(block, "norm3"), TOKEN_EPS)
        update = attention(image + pe, tokens + prompt, tokens, back, heads, gate)
        image = layer_norm(image + update, sub(block, "norm4"), TOKEN_EPS)
    last = sub(p, "final_attn_token_to_image")
    tokens = tokens + attention(tokens + prompt, image + pe, image, last, heads)
    return layer_norm(tokens, sub(p, "norm_final_attn"), TOKEN_EPS), image


def upscale(x, p):
    """(H, W, D) to (4H, 4W, D / 8), as in SAM."""
    x = gelu(layer_norm(upsample_2x(x, sub(p, "conv1")), sub(p, "norm")))
    return gelu(upsample_2x(x, sub(p, "conv2")))


def masks(up, tokens, p):
    """Logits: the MLP of each token, however deep, gives the weights of a sum over channels."""
    depth, out = 1 + max(int(name.split(".")[1]) for name in p), []
    for k, token in enumerate(tokens):
        for i in range(depth):
            layer = sub(p, f"layers.{i}")
            token = token @ layer["kernel"][k] + layer["bias"][k]
            token = np.maximum(token, 0) if i + 1 < depth else token
        out.append(up @ token)
    return np.stack(out, axis=-1)


def where_to_look(class_maps, p, heads, over):
    """Class maps (K, L) to (L, 1): two self-attentions, an MLP, one channel, softmax `over`."""
    x = attention(class_maps, class_maps, class_maps, sub(p, "attention1"), heads)
    x = layer_norm(x, sub(p, "norm1"), TOKEN_EPS)
    x = attention(x, x, x, sub(p, "attention2"), heads)
    hidden = np.maximum(linear(x, sub(p, "mlp.lin1")), 0)
    x = layer_norm(x + linear(hidden, sub(p, "mlp.lin2")), sub(p, "norm2"), TOKEN_EPS)
    score = np.exp(np.maximum(linear(x.T, sub(p, "merge")), 0))
    return score / score.sum({"channel": 1, "space": 0}[over], keepdims=True)


def forward(feature, dense, pe, p, *, depth, heads, over):
    """One image: feature, dense prompt and positions (H, W, D) to both decoders' logits."""
    h, w, d = feature.shape
    one, two, pe = sub(p, "mask_decoder"), sub(p, "second"), pe.reshape(-1, d)

    tokens = np.concatenate([one["iou_token"], one["mask_tokens"]])
    source = (feature + dense).reshape(-1, d)
    tokens, image = transformer(source, pe, tokens, sub(one, "transformer"), depth, heads)
    tokens = tokens[1:]
    up = upscale(image.reshape(h, w, d), sub(one, "upscaling"))
    first = masks(up, tokens, sub(one, "hyper_mlps"))

    low = np.moveaxis(resize(np.moveaxis(first, -1, 0), h, w), 0, -1).reshape(h * w, -1)
    gate = np.exp(low - low.max(1, keepdims=True))
    gate /= gate.sum(1, keepdims=True)
    weights = sub(two, "mask_attention")
    source = source + source * where_to_look(tokens @ image.T, weights, 8, over)
    prompt, weights = two["mask_tokens"], sub(two, "transformer")
    tokens, image = transformer(source, pe, prompt, weights, depth, heads, gate)
    own = upscale(image.reshape(h, w, d), sub(two, "upscaling"))
    x, skip = np.concatenate([own, up], -1), sub(two, "skip")
    for i in (1, 2):
        x = upsample_2x(x, sub(skip, f"conv{i}"))
        x = gelu(layer_norm(x, sub(skip, f"norm{i}")))
    return first, masks(x, tokens, sub(two, "hyper_mlps"))
