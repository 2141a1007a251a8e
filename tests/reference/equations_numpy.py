"""The paper's equations, one plain float64 numpy function each, written from its text alone.

The oracle of `test_equations.py` and `test_pgpsam.py`: loops over classes, prototypes and pixels
in the order of the printed symbols, no batch axis, nothing shared with the package. Where the
print is inconsistent, the reading is the one that makes the shapes fit; each docstring says which.
`p` maps dotted parameter names, as the model names them, to arrays: `random_module` makes it.

Legend: H W grid, L = H*W pixels (row major), C channels, N classes, Q = alpha*N inter prototypes,
k inter prototypes chosen per class, n = N*(k+1) tokens.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf

from pgpsam_jax.models.initializers import ShapeOnlyRngs

LN_EPS = 1e-6  # channel layer norm, as everywhere on SAM's image side


def random_module(make, seed: int):
    """The module `make(rngs=...)` builds with every array drawn anew, biases and scalars too.

    Returns it and its arrays in float64. Of what a module starts at, only shapes are asked for.
    """
    rng, arrays = np.random.default_rng(seed), {}
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=ShapeOnlyRngs())))
    leaves = nnx.to_flat_state(state)
    for path, leaf in leaves:
        name, value = ".".join(map(str, path)), rng.normal(size=leaf.shape)
        if path[-1] == "kernel":
            value *= np.prod(leaf.shape[:-1]) ** -0.5
        elif path[-1] == "scale":
            value = 1 + 0.3 * value
        elif path[-1] == "bias" or "encoder" in name:
            value *= 0.3
        arrays[name] = value.astype(np.float32).astype(np.float64)
    return nnx.merge(graphdef, fill(state, arrays)), arrays


def fill(state, arrays: dict):
    """A state with the arrays of those names, in float32, in place of its own."""
    leaves = nnx.to_flat_state(state)
    return nnx.from_flat_state(
        (path, leaf.replace(jnp.asarray(arrays[".".join(map(str, path))], jnp.float32)))
        for path, leaf in leaves
    )


def sub(p: dict, name: str) -> dict:
    """The parameters below one module, with the module's name cut off."""
    return {key[len(name) + 1 :]: value for key, value in p.items() if key.startswith(name + ".")}


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def softmax(x):
    """Softmax of one vector."""
    e = np.exp(x - x.max())
    return e / e.sum()


def gelu(x):
    return 0.5 * x * (1.0 + erf(x / np.sqrt(2.0)))


def linear(x, p):
    """Fully connected layer, or a pointwise convolution where `x` is a map; bias optional."""
    return x @ p["kernel"] + p.get("bias", 0.0)


def layer_norm(x, p, eps=LN_EPS):
    """Layer normalization over channels (the last axis), population variance."""
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def strip_conv(x, p, axis):
    """Depthwise strip convolution (cross-correlation) along one grid axis, zeros outside."""
    kernel, out = p["kernel"], np.zeros_like(x)
    k, size = kernel.shape[0], x.shape[axis]
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            for tap in range(k):
                at = [i, j]
                at[axis] += tap - k // 2
                if 0 <= at[axis] < size:
                    out[i, j] += kernel[tap] * x[at[0], at[1]]
    return out + p["bias"]


def eq1_spatial(f, p):
    """Eq 1: F * sigma(conv_kx1(ReLU(LN(conv_1xk(F_s))))), F_s = row means + column means.

    1xk is one row high, so it runs along the width; kx1 along the height.
    """
    f_s = np.zeros_like(f)
    for i in range(f.shape[0]):
        for j in range(f.shape[1]):
            f_s[i, j] = f[i].mean(0) + f[:, j].mean(0)
    inner = np.maximum(layer_norm(strip_conv(f_s, sub(p, "row"), axis=1), sub(p, "norm")), 0)
    return f * sigmoid(strip_conv(inner, sub(p, "column"), axis=0))


def eq2_channel(f, p):
    """Eq 2: F * sigma(conv_1x1(ReLU(LN(conv_1x1(F_c))))), F_c the mean over space (1 x 1 x C)."""
    f_c = f.reshape(-1, f.shape[-1]).mean(0)
    inner = np.maximum(layer_norm(linear(f_c, sub(p, "reduce")), sub(p, "norm")), 0)
    return f * sigmoid(linear(inner, sub(p, "expand")))


def cfm(tap, previous, p, enabled=True):
    """Section 2.1: F + F^s + F^c on the projected tap, added to the previous stage's map."""
    f = layer_norm(linear(tap, sub(p, "projection")), sub(p, "norm"))
    if not enabled:
        return f + previous
    return f + eq1_spatial(f, sub(p, "spatial")) + eq2_channel(f, sub(p, "channel")) + previous


def eq3_vector(feature, conv, fc):
    """Eq 3: FC(reshape(conv_->1(F))): a map of L pixels to a vector of H (image) or W (class)."""
    return linear(linear(feature, conv).reshape(-1), fc)


def eq4_class_weights(f_i, f_m, p):
    """Eq 4: W_c (n, L), softmax over *space* of conv_1->n of the outer product a b^T."""
    a = eq3_vector(f_i, sub(p, "image_conv"), sub(p, "image_fc"))
    b = eq3_vector(f_m, sub(p, "class_conv"), sub(p, "class_fc"))
    product = np.array([[a[i] * b[j] for j in range(len(b))] for i in range(len(a))])
    expand = sub(p, "expand")
    rows = [product.reshape(-1) * weight for weight in expand["kernel"][0]]
    return np.stack([softmax(row) for row in rows])


def select(intra, inter, k):
    """Section 2.2: the k inter prototypes of greatest cosine with each class, best first (N, k)."""
    chosen = np.zeros((len(intra), k), int)
    for n, own in enumerate(intra):
        cosine = [own @ q / np.sqrt((own @ own) * (q @ q)) for q in inter]
        chosen[n] = np.argsort(-np.array(cosine), kind="stable")[:k]
    return chosen


def gather(intra, inter, chosen):
    """Section 2.2: P^ (n, C): each class's own prototype, then its k chosen ones."""
    rows = []
    for n, own in enumerate(intra):
        rows += [own] + [inter[q] for q in chosen[n]]
    return np.stack(rows)


def scatter(intra, inter, chosen, tokens):
    """Section 2.2: add the refined tokens where they came from; an inter hit twice gets both."""
    intra, inter, rows = intra.copy(), inter.copy(), iter(tokens)
    for n in range(len(intra)):
        intra[n] += next(rows)
        for q in chosen[n]:
            inter[q] += next(rows)
    return intra, inter


def eq5_query_weights(tokens, fused):
    """Eq 5, first line: W_q (n, L) = softmax over space of P^ F^T / sqrt(C)."""
    return np.stack([softmax(fused @ token / np.sqrt(fused.shape[-1])) for token in tokens])


def eq5_tokens(alpha, beta, w_c, w_q, fused):
    """Eq 5, second line: P^' (n, C) = (alpha W_c + beta W_q) F^, the printed dot a product."""
    out = np.zeros((len(w_c), fused.shape[-1]))
    for t in range(len(w_c)):
        for pixel in range(len(fused)):
            out[t] += (alpha * w_c[t, pixel] + beta * w_q[t, pixel]) * fused[pixel]
    return out


def ppr(f_i, f_m, intra, inter, k, p):
    """Section 2.2 whole: F_I (H, W, C), F_M (H, W, N), prototypes -> refined prototypes."""
    chosen = select(intra, inter, k)
    tokens = gather(intra, inter, chosen)
    w_c = eq4_class_weights(f_i, f_m, sub(p, "class_attention"))
    fused = linear(np.concatenate([f_i, f_m], -1), sub(p, "fuse")).reshape(-1, f_i.shape[-1])
    if "token_norm.scale" in p:  # not printed, but in the authors' release
        tokens = layer_norm(tokens, sub(p, "token_norm"), eps=1e-5)
        fused = layer_norm(fused, sub(p, "fused_norm"), eps=1e-5)
    w_q = eq5_query_weights(tokens, fused)
    return scatter(intra, inter, chosen, eq5_tokens(p["alpha"], p["beta"], w_c, w_q, fused))


def joined(own, others, p):
    """Section 2.3: FC of [P, P others^T], the prototypes beside their products with the others.

    With the LayerNorm (eps 1e-5) that the authors' release and this project put behind it.
    """
    products = np.array([[one @ other for other in others] for one in own])
    joined = linear(np.concatenate([own, products], -1), sub(p, "join"))
    return layer_norm(joined, sub(p, "norm"), eps=1e-5)


def mlp(x, p):
    """Section 2.3: two pointwise layers with a GELU between."""
    return linear(gelu(linear(x, sub(p, "lin1"))), sub(p, "lin2"))


def eq6_attention(f_i, prototypes):
    """Inner part of Eq 6: softmax_Q(F_I P^T / sqrt C) P for every pixel, (H, W, C)."""
    out = np.zeros_like(f_i)
    for i in range(f_i.shape[0]):
        for j in range(f_i.shape[1]):
            weights = softmax(prototypes @ f_i[i, j] / np.sqrt(f_i.shape[-1]))
            out[i, j] = weights @ prototypes
    return out


def eq6_dense(f_i, intra, inter, p):
    """Eq 6: D (H, W, C) = MLP(softmax_Q(F_I P^_inter^T / sqrt C) P^_inter)."""
    return mlp(eq6_attention(f_i, joined(inter, intra, p)), sub(p, "mlp"))


def eq7_attention(prototypes, f_i):
    """Inner part of Eq 7: softmax over space of P F_I^T / sqrt C, times F_I, (N, C)."""
    pixels = f_i.reshape(-1, f_i.shape[-1])
    return np.stack([softmax(pixels @ one / np.sqrt(len(one))) @ pixels for one in prototypes])


def eq7_sparse(f_i, intra, inter, p):
    """Eq 7: S (N, C) = MLP(softmax_L(P^_intra F_I^T / sqrt C) F_I), one prompt per class."""
    return mlp(eq7_attention(joined(intra, inter, p), f_i), sub(p, "mlp"))


def class_feature(mask_tokens, image_tokens):
    """F_M (H, W, N): the decoder's mask-token outputs against its image tokens, no softmax."""
    out = np.zeros((*image_tokens.shape[:2], len(mask_tokens)))
    for n, token in enumerate(mask_tokens):
        out[..., n] = image_tokens @ token
    return out


def pgp_sam(neck, taps, decode, p, *, stages, k, cfm_on=True, ppg_on=True, ppr_on=True):
    """Figure 2: bootstrap pass, then the stages; returns the logits of every decoder pass.

    `neck` (H, W, C); `taps` one (H, W, width) map per stage; `decode(feature, sparse, dense)` the
    shared decoder, giving (logits, mask tokens, image tokens). Refined prototypes pass on. Only
    PPR reads a pass between the first and the last, so without it there is none.
    """
    feature = neck
    intra, inter = (p["intra"], p["inter"]) if ppg_on else (None, None)

    def run(i):
        if ppg_on:
            dense = eq6_dense(feature, intra, inter, sub(p, f"ppg.{i}.dense"))
            sparse = eq7_sparse(feature, intra, inter, sub(p, f"ppg.{i}.sparse"))
        else:
            dense = np.broadcast_to(p["default_dense"], feature.shape)
            sparse = np.zeros((0, feature.shape[-1]))
        logits, mask_tokens, image_tokens = decode(feature, sparse, dense)
        return logits, class_feature(mask_tokens, image_tokens)

    logits, f_m = run(0)
    outputs = [logits]
    for s in range(stages):
        feature = cfm(taps[s], feature, sub(p, f"cfm.{s}"), cfm_on)
        if ppr_on:
            intra, inter = ppr(feature, f_m, intra, inter, k, sub(p, f"ppr.{s}"))
        if ppr_on or s == stages - 1:
            logits, f_m = run(len(outputs))
            outputs.append(logits)
    return outputs
