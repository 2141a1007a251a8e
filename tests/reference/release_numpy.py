"""The model of the authors' release, one plain numpy function a module, for one image.

Written from the description of that model alone, as an oracle: no batch axis, whole matrices in
the order of the text, nothing shared with the package. `p` maps the release's own PyTorch names to
arrays in PyTorch's layouts; every size (image, patch, classes, width, windows) and number (blocks,
stages) follows from their shapes and names. Maps are (C, H, W), tokens (T, C). `np` and `erf` may
be exchanged for those of `autograd`: nothing here writes into an array.

Legend: H W grid, L = H*W pixels (row major), C width, N classes, Q = 8N inter prototypes, k = 4
inter prototypes chosen per class, n = N*(k+1) tokens, P class probabilities (N, H, W).
"""

import numpy as np
from scipy.special import erf

from tests.reference.equations_numpy import sub

HEADS = 8  # of every attention outside the encoder
MAP_EPS, TOKEN_EPS = 1e-6, 1e-5  # layer norms of maps and of the encoder; of tokens


def count(p, name):
    """Modules in a list of that name."""
    return len({key.split(".")[1] for key in p if key.startswith(name + ".")})


# Layers


def sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def relu(x):
    return np.maximum(x, 0.0)


def leaky_relu(x):
    return np.where(x > 0, x, 0.01 * x)


def gelu(x):
    """The tanh approximation, everywhere but in the encoder."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1.0 + erf(x / np.sqrt(2.0)))


def softmax(x, axis=-1):
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


def flat(x):
    """A map as (C, L)."""
    return np.reshape(x, (x.shape[0], -1))


def linear(x, p):
    """Fully connected layer over the last axis; bias optional."""
    return x @ p["weight"].T + p.get("bias", 0.0)


def standardise(x, axis, eps):
    centered = x - np.mean(x, axis=axis, keepdims=True)
    return centered / np.sqrt(np.mean(centered**2, axis=axis, keepdims=True) + eps)


def layer_norm(x, p, eps=TOKEN_EPS):
    """Layer norm over the last axis."""
    return standardise(x, -1, eps) * p["weight"] + p["bias"]


def map_norm(x, p):
    """Layer norm over the channels of a map, pixel by pixel."""
    return standardise(x, 0, MAP_EPS) * p["weight"][:, None, None] + p["bias"][:, None, None]


def gain(vector, x):
    """A vector over the channels of a map, times the map."""
    return vector[:, None, None] * x


def conv(x, p, dilation=1):
    """Cross-correlation, zeros outside, output as large as the input.

    A kernel of one input channel is depthwise, any other dense.
    """
    weight = p["weight"]
    rows, columns = weight.shape[2:]
    high, wide = dilation * (rows // 2), dilation * (columns // 2)
    padded = np.pad(x, ((0, 0), (high, high), (wide, wide)), "constant")
    out = 0.0
    for i in range(rows):
        for j in range(columns):
            top, left = i * dilation, j * dilation
            shifted = padded[:, top : top + x.shape[1], left : left + x.shape[2]]
            if weight.shape[1] == 1 and x.shape[0] > 1:
                out = out + gain(weight[:, 0, i, j], shifted)
            else:
                product = weight[:, :, i, j] @ flat(shifted)
                out = out + np.reshape(product, (-1, *x.shape[1:]))
    return out + p["bias"][:, None, None] if "bias" in p else out


def conv_transpose(x, p):
    """Transposed 2x2 convolution of stride 2: each pixel becomes a 2x2 patch of its own."""
    weight = p["weight"]
    patches = np.tensordot(weight, x, ((0,), (0,)))  # (D, 2, 2, H, W)
    out = np.transpose(patches, (0, 3, 1, 4, 2))
    out = np.reshape(out, (weight.shape[1], 2 * x.shape[1], 2 * x.shape[2]))
    return out + p["bias"][:, None, None]


def resize_matrix(size, to):
    """Linear interpolation of one axis between pixel centers, edges repeated: (to, size)."""
    center = np.clip((np.arange(to) + 0.5) * size / to - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(center[:, None] - np.arange(size)))


def resize(x, h, w):
    """Bilinear without antialiasing, of the last two axes."""
    return resize_matrix(x.shape[-2], h) @ x @ resize_matrix(x.shape[-1], w).T


def split_heads(x, heads):
    """(T, C) to (heads, T, C / heads)."""
    return np.transpose(np.reshape(x, (x.shape[0], heads, -1)), (1, 0, 2))


def join_heads(x):
    return np.reshape(np.transpose(x, (1, 0, 2)), (x.shape[1], -1))


# Image encoder (1.5)


def decomposed_positions(q, table, rows):
    """Products of the queries with the embedding of each distance along one axis.

    `q` (..., rows, c) with that axis last but one, `table` (2 rows - 1, c): (..., rows, rows).
    """
    distance = np.arange(rows)[:, None] - np.arange(rows)[None, :] + rows - 1
    return (q[..., None, :] @ np.swapaxes(table[distance], 1, 2))[..., 0, :]


def window_attention(x, p):
    """Attention within one window (or the whole grid): (h, w, D) to (h, w, D)."""
    h, w, width = x.shape
    tokens = np.reshape(x, (h * w, width))
    q, k, v = np.split(linear(tokens, sub(p, "qkv")), 3, axis=-1)
    q = q + linear(linear(tokens, sub(p, "lora_linear_a_q")), sub(p, "lora_linear_b_q"))
    v = v + linear(linear(tokens, sub(p, "lora_linear_a_v")), sub(p, "lora_linear_b_v"))
    size = p["rel_pos_h"].shape[1]
    q, k, v = (split_heads(y, width // size) for y in (q, k, v))
    grid = np.reshape(q, (-1, h, w, size))
    by_row = np.swapaxes(decomposed_positions(np.swapaxes(grid, 1, 2), p["rel_pos_h"], h), 1, 2)
    by_column = decomposed_positions(grid, p["rel_pos_w"], w)
    bias = by_row[..., :, None] + by_column[..., None, :]  # (heads, h, w, h, w)
    scores = q @ np.swapaxes(k, 1, 2) / np.sqrt(size) + np.reshape(bias, (-1, h * w, h * w))
    return np.reshape(linear(join_heads(softmax(scores) @ v), sub(p, "proj")), x.shape)


def encoder_attention(x, p):
    """Attention of one block: the grid is cut into windows of the position table's size.

    Windows reach past the grid where it is no multiple of them: zeros, which attend and are seen.
    """
    size = (p["rel_pos_h"].shape[0] + 1) // 2
    h, w, _ = x.shape
    padded = np.pad(x, ((0, -h % size), (0, -w % size), (0, 0)), "constant")
    rows = [
        np.concatenate(
            [
                window_attention(padded[i : i + size, j : j + size], p)
                for j in range(0, padded.shape[1], size)
            ],
            axis=1,
        )
        for i in range(0, padded.shape[0], size)
    ]
    return np.concatenate(rows, axis=0)[:h, :w]


def encoder_block(x, p):
    x = x + encoder_attention(layer_norm(x, sub(p, "norm1"), MAP_EPS), sub(p, "attn"))
    hidden = gelu_erf(linear(layer_norm(x, sub(p, "norm2"), MAP_EPS), sub(p, "mlp.lin1")))
    return x + linear(hidden, sub(p, "mlp.lin2"))


def image_encoder(image, p):
    """Image (3, S, S) to the neck (C, H, W) and the taps (H, W, D) of all global blocks."""
    weight = p["patch_embed.proj.weight"]
    width, channels, size, _ = weight.shape
    h, w = image.shape[1] // size, image.shape[2] // size
    patches = np.reshape(image, (channels, h, size, w, size)).transpose(1, 3, 0, 2, 4)
    x = np.reshape(patches, (h, w, -1)) @ np.reshape(weight, (width, -1)).T
    x = x + p["patch_embed.proj.bias"] + p["pos_embed"][0]
    taps, i = [], 0
    while f"blocks.{i}.norm1.weight" in p:
        block = sub(p, f"blocks.{i}")
        x = encoder_block(x, block)
        if block["attn.rel_pos_h"].shape[0] == 2 * h - 1:
            taps.append(x)
        i += 1
    neck = map_norm(conv(np.transpose(x, (2, 0, 1)), sub(p, "neck.0")), sub(p, "neck.1"))
    return map_norm(conv(neck, sub(p, "neck.2")), sub(p, "neck.3")), taps


# Pre-prompt pass (1.7)


def conv_norm(x, p):
    """Convolution and channel layer norm, each as far as it has weights."""
    x = conv(x, sub(p, "conv"))
    return map_norm(x, sub(p, "norm")) if "norm.weight" in p else x


def channel_gate(x, p):
    """Sigmoid of two pointwise layers on the spatial mean: (C, 1, 1)."""
    mean = np.mean(x, axis=(1, 2), keepdims=True)
    return sigmoid(conv_norm(leaky_relu(conv_norm(mean, sub(p, "0"))), sub(p, "1")))


def csm(x, p):
    return x + x * channel_gate(x, sub(p, "mlp"))


# Feature refinement, CFM (1.8)


def spatial_gate(x, p):
    means = np.mean(x, axis=1, keepdims=True) + np.mean(x, axis=2, keepdims=True)
    return sigmoid(conv_norm(leaky_relu(conv_norm(means, sub(p, "0"))), sub(p, "1")))


def scm(f, p):
    """Both gates, merged two neighboring channels at a time, on top of F."""
    spatial = f + gain(p["alpha"], f * spatial_gate(f, sub(p, "sem_conv")))
    channel = f + gain(p["beta"], f * channel_gate(f, sub(p, "cem_conv")))
    pairs = np.concatenate([spatial, channel], axis=0)
    weight = p["conv.0.conv.weight"]
    merged = gain(weight[:, 0, 0, 0], pairs[0::2]) + gain(weight[:, 1, 0, 0], pairs[1::2])
    merged = leaky_relu(map_norm(merged, sub(p, "conv.0.norm")))
    return conv_norm(merged, sub(p, "conv.1")) + f


def gated_ffn(x, p):
    hidden = conv_norm(
        conv_norm(map_norm(x, sub(p, "norm")), sub(p, "project_in")), sub(p, "dwconv")
    )
    half = hidden.shape[0] // 2
    return x + conv_norm(leaky_relu(hidden[:half]) * hidden[half:], sub(p, "project_out"))


def feature_refinement(tap, previous, p):
    """Tap (H, W, D) and previous map to X_s (C, H, W) and U_s (C/8, 4H, 4W)."""
    f = conv_norm(np.transpose(tap, (2, 0, 1)), sub(p, "proj"))
    x = gated_ffn(scm(f, sub(p, "scm")) + previous, sub(p, "final"))
    up = leaky_relu(conv_transpose(x, sub(p, "up_sample.0.up_sample")))
    return x, conv_transpose(up, sub(p, "up_sample.1.up_sample"))


# Prototype refinement, PPR (1.9)


def class_attention(tokens, x, f_m, probabilities, p):
    """Tokens (n, C), each a class's own prototype or one of its inter ones, read the fused map."""
    n, width = tokens.shape
    q = linear(layer_norm(tokens, sub(p, "q_norm")), sub(p, "q_proj"))
    fused = gelu(conv_norm(np.concatenate([x, f_m], axis=0), sub(p, "x_proj.0")))
    fused = conv_norm(conv_norm(fused, sub(p, "x_proj.1")), sub(p, "x_conv"))
    fused = flat(fused).T
    k, v = linear(fused, sub(p, "k_proj")), linear(fused, sub(p, "v_proj"))

    column = linear(np.reshape(conv_norm(x, sub(p, "image_conv")), -1), sub(p, "image_proj"))
    row = linear(np.reshape(conv_norm(f_m, sub(p, "mask_conv")), -1), sub(p, "mask_proj"))
    by_class = flat(conv_norm((column[:, None] * row[None, :])[None], sub(p, "conv")))  # (n, L)

    gate = np.repeat(flat(probabilities), n // len(f_m), axis=0)
    q, k, v = (split_heads(y, HEADS) for y in (q, k, v))
    by_query = q @ np.swapaxes(k, 1, 2) * gate
    scores = (p["alpha"] * by_class + p["beta"] * by_query) / np.sqrt(width / HEADS)
    return linear(join_heads(softmax(scores) @ v), sub(p, "out_proj"))


def ffn(x, p):
    hidden = gelu(linear(layer_norm(x, sub(p, "norm")), sub(p, "ffl.0")))
    return x + linear(hidden, sub(p, "ffl.2"))


def prototype_refinement(x, f_m, inter, intra, probabilities, p):
    """Prototypes with their embeddings added, (Q, C) and (N, C), to the refined ones."""
    inter, intra = linear(inter, sub(p, "in_proj1")), linear(intra, sub(p, "in_proj2"))
    length = [np.sqrt(np.sum(y**2, -1, keepdims=True)) for y in (intra, inter)]
    classes, width = intra.shape
    k = p["class_attn.conv.conv.weight"].shape[0] // classes - 1
    cosine = (intra / length[0]) @ (inter / length[1]).T
    chosen = np.argsort(-cosine, axis=1)[:, :k]
    tokens = np.concatenate([intra[:, None], inter[chosen]], axis=1)
    tokens = np.reshape(tokens, (-1, width))
    update = class_attention(tokens, x, f_m, probabilities, sub(p, "class_attn"))
    update = np.reshape(update, (classes, k + 1, width))

    target = np.arange(len(inter))[:, None] == chosen.reshape(-1)[None, :]
    inter = inter + p["inter"] * (target @ np.reshape(update[:, 1:], (-1, width)))
    intra = intra + p["intra"] * update[:, 0]

    weights = flat(probabilities)
    inter = linear(np.concatenate([inter, weights @ flat(x).T], axis=0).T, sub(p, "linear1")).T
    intra = linear(np.concatenate([intra, weights @ flat(f_m).T], axis=1), sub(p, "linear2"))
    return ffn(inter, sub(p, "out_proj1")), ffn(intra, sub(p, "out_proj2"))


# Prompt generation, PPG (1.10)


def deformable_conv(x, p, dilation):
    """Modulated deformable depthwise 3x3, bilinear, zero outside the map.

    Bilinear sampling is a sum over all pixels, weighted by their distance along each axis.
    """
    h, w = x.shape[1:]
    moves = conv(x, sub(p, "dcn_offset"), dilation)
    weight, out = p["deform_conv.weight"], p["deform_conv.bias"][:, None]
    for i in range(3):
        for j in range(3):
            tap = 3 * i + j
            y = np.arange(h)[:, None] + (i - 1) * dilation + moves[2 * tap]
            z = np.arange(w)[None, :] + (j - 1) * dilation + moves[2 * tap + 1]
            by_row = relu(1 - np.abs(np.reshape(y, (-1, 1)) - np.arange(h)))
            by_column = relu(1 - np.abs(np.reshape(z, (-1, 1)) - np.arange(w)))
            sampling = np.reshape(by_row[:, :, None] * by_column[:, None, :], (h * w, h * w))
            sampled = flat(x) @ sampling.T * sigmoid(np.reshape(moves[18 + tap], -1))
            out = out + weight[:, 0, i, j][:, None] * sampled
    return np.reshape(out, x.shape)


def deformable_block(x, p):
    """Large-kernel attention with deformable convolutions, then a convolutional feed-forward.

    The norm closes the first residual, and the second one starts behind it.
    """
    gate = gelu(conv_norm(x, sub(p, "in_proj")))
    seen = deformable_conv(gate, sub(p, "deform_conv0"), 1)
    seen = deformable_conv(seen, sub(p, "deform_conv1"), 3)
    x = map_norm(x + gate * conv_norm(seen, sub(p, "conv")), sub(p, "norm"))
    hidden = conv_norm(x, sub(p, "out_proj.0"))
    hidden = gelu(conv_norm(hidden, sub(p, "out_proj.1")))
    return x + conv_norm(hidden, sub(p, "out_proj.2"))


def dense_prompt(x, inter, intra, probabilities, p):
    """Dense prompts (C, H, W): every pixel reads the inter prototypes."""
    tokens = np.concatenate([inter, inter @ intra.T], axis=1)
    tokens = linear(gelu(linear(tokens, sub(p, "proj"))), sub(p, "linear"))
    tokens = layer_norm(tokens, sub(p, "norm"))
    if probabilities is not None:
        x = x + x * np.reshape(intra.T @ flat(probabilities), x.shape)
    x = deformable_block(x, sub(p, "dcn"))
    weights = softmax(flat(x).T @ tokens.T / np.sqrt(tokens.shape[1]))
    read = np.reshape((weights @ tokens).T, x.shape) + gain(p["alpha"], x)
    return conv_norm(gelu(conv_norm(read, sub(p, "out.0"))), sub(p, "out.2"))


def prototype_adapter(intra, inter, p):
    x = np.concatenate([intra, intra @ inter.T], axis=1)
    x = linear(gelu(linear(x, sub(p, "in_proj"))), sub(p, "linear"))
    x = layer_norm(x, sub(p, "norm"))
    branches = [gelu(linear(x, sub(p, f"adapter_layer.{i}.0"))) for i in range(8)]
    return mlp(np.concatenate(branches, axis=1), sub(p, "out_proj"))


def mlp(x, p):
    """Three layers with ReLUs between."""
    x = relu(linear(x, sub(p, "layers.0")))
    return linear(relu(linear(x, sub(p, "layers.1"))), sub(p, "layers.2"))


def sparse_prompt(x, inter, intra, probabilities, p):
    """Sparse prompts (N, C): every class's prototype reads the map."""
    x = flat(conv(x, sub(p, "dconv.conv"), dilation=2)).T
    tokens = prototype_adapter(intra, inter, sub(p, "prototype_adapter"))
    weights = softmax(tokens @ x.T / np.sqrt(x.shape[1]))
    if probabilities is not None:
        weights = weights * flat(probabilities)
    read = weights @ x + p["alpha"] * tokens
    return linear(gelu(linear(read, sub(p, "out.0"))), sub(p, "out.2"))


def prompt_generator(x, inter, intra, probabilities, p):
    """Prototypes with their embeddings added; `probabilities` None in the pre-prompt pass."""
    dense = dense_prompt(x, inter, intra, probabilities, sub(p, "dense_prompt_generator"))
    return dense, sparse_prompt(x, inter, intra, probabilities, sub(p, "sparse_prompt_generator"))


# Mask decoder (1.11)


def sine_positions(width, h, w):
    """DETR's sine code (C, H, W) of row, then column number, from 1 and divided by the size."""
    quarter = np.arange(width // 4)
    frequency = 10000.0 ** (-2 * quarter / (width // 2))

    def code(size):
        position = 2 * np.pi * (np.arange(size) + 1) / (size + 1e-6)
        angle = position[:, None] * frequency
        return np.reshape(np.stack([np.sin(angle), np.cos(angle)], -1), (size, -1)).T

    rows = np.broadcast_to(code(h)[:, :, None], (width // 2, h, w))
    columns = np.broadcast_to(code(w)[:, None, :], (width // 2, h, w))
    return np.concatenate([rows, columns], axis=0)


def attention(q, k, v, p, gate=None):
    """Ordinary attention; `gate` (queries, keys) multiplies the weights."""
    q, k, v = (
        split_heads(linear(x, sub(p, f"{name}_proj")), HEADS)
        for x, name in ((q, "q"), (k, "k"), (v, "v"))
    )
    weights = softmax(q @ np.swapaxes(k, 1, 2) / np.sqrt(q.shape[-1]))
    if gate is not None:
        weights = weights * gate
    return linear(join_heads(weights @ v), sub(p, "out_proj"))


def cosine_attention(q, v, p):
    """Tokens to image: unit queries and keys, keys made of the values."""
    q, k, v = (linear(x, sub(p, f"{name}_proj")) for x, name in ((q, "q"), (v, "k"), (v, "v")))
    q, k = (x / np.sqrt(np.sum(x**2, -1, keepdims=True)) for x in (q, k))
    q, k, v = (split_heads(x, HEADS) for x in (q, k, v))
    weights = softmax(q @ np.swapaxes(k, 1, 2) / np.sqrt(q.shape[-1]))
    return linear(join_heads(weights @ v), sub(p, "out_proj"))


def two_way_transformer(image, image_pe, prompt, token_pe, gate, p):
    """Tokens (T, C) and image (L, C); the first self-attention has no positions, no residual."""
    tokens = prompt
    for i in range(count(p, "layers")):
        block = sub(p, f"layers.{i}")
        look = cosine_attention(tokens + token_pe, image, sub(block, "cross_attn_token_to_image"))
        tokens = layer_norm(tokens + look, sub(block, "norm1"))
        if i == 0:
            tokens = attention(tokens, tokens, tokens, sub(block, "self_attn"))
        else:
            q = tokens + token_pe
            tokens = tokens + attention(q, q, tokens, sub(block, "self_attn"))
        tokens = layer_norm(tokens, sub(block, "norm2"))
        hidden = relu(linear(tokens, sub(block, "mlp.lin1")))
        tokens = layer_norm(tokens + linear(hidden, sub(block, "mlp.lin2")), sub(block, "norm3"))
        look = attention(
            image + image_pe,
            tokens + token_pe,
            tokens,
            sub(block, "cross_attn_image_to_token"),
            gate,
        )
        image = layer_norm(image + look, sub(block, "norm4"))
    last = sub(p, "final_attn_token_to_image")
    tokens = tokens + attention(tokens + token_pe, image + image_pe, image, last)
    return layer_norm(tokens, sub(p, "norm_final_attn")), image


def class_maps(f_m, p):
    """Self-attention over the class maps of F_M, each one token of L values: (N, L)."""
    norm = sub(p, "norm")
    x = standardise(f_m, 0, TOKEN_EPS) * norm["weight"][:, None, None] + norm["bias"][:, None, None]
    x = flat(x)
    return attention(x, x, x, sub(p, "attn"))


def skip_connect(up, u, p):
    x = np.concatenate([up, u], axis=0)
    x = gelu(conv_norm(x, sub(p, "0")))
    return up + gelu(conv_norm(x, sub(p, "1")))


def mask_decoder(image, dense, sparse, p, u=None, f_m=None, low=None):
    """Logits (N, 4H, 4W) and the next F_M (N, H, W); `u`, `f_m`, `low` in the stages only."""
    width, h, w = image.shape
    own = p["mask_tokens.weight"]
    src, gate = flat(image + dense).T, None  # (L, C)
    if low is not None:
        maps = class_maps(f_m, p)
        src = src + (leaky_relu(src.T @ flat(low).T) @ maps).T
        chances = flat(softmax(low, 0)).T
        gate = np.concatenate([chances, chances], axis=1)
    tokens, src = two_way_transformer(
        src,
        flat(sine_positions(width, h, w)).T,
        np.concatenate([own, sparse], axis=0),
        p["pos_token.weight"],
        gate,
        sub(p, "transformer"),
    )
    tokens = tokens[: len(own)]
    features = np.reshape(src, image.shape)  # (L, C) read as (C, H, W): no transpose in the release
    up = gelu(conv_transpose(features, sub(p, "output_upscaling.0.up_sample")))
    up = gelu(conv_transpose(up, sub(p, "output_upscaling.1.up_sample")))
    if u is not None:
        up = skip_connect(up, u, sub(p, "skip_connect"))
    kernels = [
        mlp(token[None], sub(p, f"output_hypernetworks_mlps.{i}")) for i, token in enumerate(tokens)
    ]
    logits = np.reshape(np.concatenate(kernels, axis=0) @ flat(up), (-1, *up.shape[1:]))
    return logits, np.reshape(tokens @ src.T, (-1, h, w))


# The whole model (1.7) and its loss (1.12)


def decode(neck, taps, p):
    """From the encoder's outputs to the outputs of every module call, by its name.

    `mask_decoder.call0` is the pre-prompt pass, the others are the stages.
    """
    out, stages = {}, sub(p, "prototype_prompt_encoder")
    table = sub(p, "global_prototypes")
    inter, intra = table["inter_prototypes.weight"], table["intra_prototypes.weight"]
    inter_embed, intra_embed = table["inter_embed.weight"], table["intra_embed.weight"]

    def record(name, *outputs):
        out.update({f"{name}.out{i}": y for i, y in enumerate(outputs)})
        return outputs

    def embedded():
        return inter + inter_embed, intra + intra_embed

    pre, decoder = sub(p, "pre_prompt"), sub(p, "mask_decoder")
    (x,) = record(
        "pre_prompt.csm.call0",
        csm(neck + pre["mask_embed.weight"][0][:, None, None], sub(pre, "csm")),
    )
    prompts = prompt_generator(x, *embedded(), None, sub(pre, "prompt_generator"))
    record("pre_prompt.prompt_generator.call0", *prompts)
    logits, f_m = record("mask_decoder.call0", *mask_decoder(neck, *prompts, decoder))
    for s in range(count(stages, "feature_refinement")):
        low = resize(logits, *neck.shape[1:])
        probabilities = softmax(low, 0)
        name = f"feature_refinement.{s}"
        x, u = feature_refinement(taps[-1 if s == 0 else 0], x, sub(stages, name))
        record(f"prototype_prompt_encoder.{name}.call0", x, u)
        x = x + stages["level_image.weight"][s][:, None, None]
        f_m = f_m + stages["level_mask.weight"][s][:, None, None]
        name = f"prototype_refinement.{s}"
        inter, intra = prototype_refinement(x, f_m, *embedded(), probabilities, sub(stages, name))
        record(f"prototype_prompt_encoder.{name}.call0", inter, intra)
        name = f"prompt_generator.{s}"
        prompts = prompt_generator(x, *embedded(), probabilities, sub(stages, name))
        record(f"prototype_prompt_encoder.{name}.call0", *prompts)
        logits, f_m = mask_decoder(x, *prompts, decoder, u, f_m, low)
        record(f"mask_decoder.call{s + 1}", logits, f_m)
    return out


def forward(image, p):
    """Image (3, S, S) to the outputs of every module and both logits, (N, 4H, 4W) and (N, S, S)."""
    neck, taps = image_encoder(image, sub(p, "image_encoder"))
    encoder = {"neck": neck, "tap_first": taps[0], "tap_last": taps[-1]}
    out = {f"image_encoder.{name}": y for name, y in encoder.items()} | decode(neck, taps, p)
    out["logits_pre"] = out["mask_decoder.call0.out0"]
    last = count(sub(p, "prototype_prompt_encoder"), "feature_refinement")
    out["logits_final"] = resize(out[f"mask_decoder.call{last}.out0"], *image.shape[1:])
    return out


def output_loss(logits, labels):
    """Cross-entropy and Dice of one output; labels (S, S) shrink to it by the nearest rule.

    A Dice loss of each class, background too, squares in the denominator; the mean over classes.
    """
    classes, h, w = logits.shape
    rows, columns = (np.arange(n) * size // n for n, size in zip((h, w), labels.shape, strict=True))
    truth = (labels[rows][:, columns] == np.arange(classes)[:, None, None]).astype(float)
    p = softmax(logits, axis=0)
    ce = -np.mean(np.sum(truth * np.log(p), axis=0))
    overlap = np.sum(p * truth, axis=(1, 2))
    sizes = np.sum(p**2, axis=(1, 2)) + np.sum(truth, axis=(1, 2))
    dice = np.mean(1 - 2 * overlap / (sizes + 1e-5))
    return {"loss": 0.2 * ce + 0.8 * dice, "ce_loss": ce, "dice_loss": dice}


def loss(out, labels, epoch):
    """(1 - w) of the pre-prompt output's loss and w of the final one's, with their parts."""
    w = 0.6 ** (0.99**epoch)
    pre, final = (output_loss(out[f"logits_{name}"], labels) for name in ("pre", "final"))
    total = (1 - w) * pre["loss"] + w * final["loss"]
    return {"total": total, "w": w, "pre": pre, "final": final}
