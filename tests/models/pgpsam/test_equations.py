"""Each equation of the paper against its plain numpy transcription, and what must hold of it.

Float32 against float64, every parameter random (biases, alpha and beta too), on a grid that is not
square. Errors are relative L2; the largest measured on CPU is 3.4e-7.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.models.pgpsam import cfm, ppg, ppr
from pgpsam_jax.models.sam import mask_decoder
from tests.reference import equations_numpy as eq

B, H, W, C, N = 2, 5, 7, 16, 3
TOLERANCE = 1e-6
KEYS = st.integers(0, 2**32 - 1)
few = settings(max_examples=8, deadline=None)

# Compiled once per shape: the properties below call them many times.
call = nnx.jit(lambda module, *args: module(*args))
select_inter = jax.jit(ppr.select_inter, static_argnums=2)
gather_tokens, scatter_tokens = jax.jit(ppr.gather_tokens), jax.jit(ppr.scatter_tokens)
query_attention, attend_tokens = jax.jit(ppr.query_attention), jax.jit(ppr.attend_tokens)
affinity, dense_attention = jax.jit(ppg.affinity), jax.jit(ppg.dense_attention)
sparse_attention, class_features = (
    jax.jit(ppg.sparse_attention),
    jax.jit(mask_decoder.class_features),
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative(got, expected) -> float:
    """Relative L2 error in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def each(function, *batched):
    """An equation, written for one image, over a batch in float64."""
    images = zip(*(np.asarray(x, np.float64) for x in batched), strict=True)
    return [function(*image) for image in images]


def close(got, expected, tolerance=TOLERANCE):
    error = relative(got, np.stack(expected))
    assert error <= tolerance, error


@functools.cache
def build(kind, *args, **kwargs):
    """A module with random parameters, compiled, and those parameters in float64."""
    make = functools.partial(kind, *args, **kwargs, dtype=jnp.float32)
    module, p = eq.random_module(make, 1)
    return module, p


def refinement(k):
    return build(ppr.PrototypeRefinement, C, N, k, (H, W))


def generator(inter):
    return build(ppg.PromptGenerator, C, N, inter)


FEATURE, CLASS_FEATURE = normal(2, B, H, W, C), normal(3, B, H, W, N)


# Section 2.1: contextual feature modulation.


@pytest.mark.parametrize("k", [1, 3, 5, 7, 11])  # 7 and 11 reach over the whole grid
@pytest.mark.parametrize("axis", [0, 1])
def test_strip_convolution_is_depthwise_and_zero_padded(axis, k):
    module, p = build(cfm.StripConv, C, k, axis + 1)
    close(call(module, FEATURE), each(lambda x: eq.strip_conv(x, p, axis), FEATURE))
    one = np.zeros_like(FEATURE)
    one[..., 3] = FEATURE[..., 3]
    touched = np.any(np.asarray(call(module, one) - p["bias"].astype(np.float32)), axis=(0, 1, 2))
    assert touched.tolist() == [c == 3 for c in range(C)]


def test_eq1_spatial_modulation():
    gate, p = build(cfm.SpatialGate, C, 5)
    close(FEATURE * call(gate, FEATURE), each(lambda f: eq.eq1_spatial(f, p), FEATURE))


def test_eq1_runs_along_the_width_first():
    """The other order of the two strips is another function, so the order is really pinned."""
    gate, p = build(cfm.SpatialGate, C, 5)
    swap = {"row": "column", "column": "row"}
    swapped = {".".join([swap.get(a, a), *b]): v for n, v in p.items() for a, *b in [n.split(".")]}
    tilted = each(lambda f: eq.eq1_spatial(f.swapaxes(0, 1), swapped).swapaxes(0, 1), FEATURE)
    assert relative(FEATURE * call(gate, FEATURE), np.stack(tilted)) > 0.01


def test_eq2_channel_modulation():
    gate, p = build(cfm.ChannelGate, C)
    close(FEATURE * call(gate, FEATURE), each(lambda f: eq.eq2_channel(f, p), FEATURE))


@pytest.mark.parametrize("scale", [1.0, 0.01])  # small taps show the epsilon of the layer norm
@pytest.mark.parametrize("enabled", [True, False])
def test_modulated_features_are_merged_with_the_previous_stage(enabled, scale):
    module, p = build(cfm.ContextualFeatureModulation, 24, C, k=5, enabled=enabled)
    tap = scale * normal(4, B, H, W, 24)
    close(call(module, tap, FEATURE), each(lambda t, x: eq.cfm(t, x, p, enabled), tap, FEATURE))


@few
@given(KEYS, st.integers(0, W - 1))
def test_strip_convolution_commutes_with_moving_the_other_axis(seed, shift):
    module, _ = build(cfm.StripConv, C, 5, 1)
    x = normal(seed, B, H, W, C)
    np.testing.assert_array_equal(
        call(module, np.roll(x, shift, axis=2)), np.roll(call(module, x), shift, axis=2)
    )


@few
@given(KEYS, st.integers(1, 4))
def test_strip_convolution_moves_with_its_input_away_from_the_border(seed, shift):
    module, _ = build(cfm.StripConv, C, 3, 2)
    x = np.zeros((1, H, 12, C), np.float32)
    x[:, :, 2:6] = normal(seed, 1, H, 4, C)  # nothing reaches the border, moved or not
    moved = call(module, np.roll(x, shift, axis=2))
    np.testing.assert_array_equal(moved, np.roll(call(module, x), shift, axis=2))


@few
@given(KEYS)
def test_gates_see_only_the_means_they_are_built_on(seed):
    """Eq 2 ignores where a pixel is; Eq 1 ignores what leaves all row and column means alone."""
    pixels = np.random.default_rng(seed).permutation(H * W)
    shuffled = FEATURE.reshape(B, -1, C)[:, pixels].reshape(FEATURE.shape)
    channel, _ = build(cfm.ChannelGate, C)
    assert relative(call(channel, shuffled), call(channel, FEATURE)) < TOLERANCE
    spatial, _ = build(cfm.SpatialGate, C, 5)
    added = normal(seed, B, H, W, C)
    added -= added.mean(1, keepdims=True)
    added -= added.mean(2, keepdims=True)
    assert relative(call(spatial, FEATURE + added), call(spatial, FEATURE)) < TOLERANCE


# Section 2.2: progressive prototype refinement.


def test_eq3_axial_vectors():
    module, p = refinement(2)
    module, p = module.class_attention, eq.sub(p, "class_attention")
    image, klass = module.vectors(FEATURE, CLASS_FEATURE)
    assert image.shape == (B, H) and klass.shape == (B, W)
    for got, which, x in ((image, "image", FEATURE), (klass, "class", CLASS_FEATURE)):
        conv, fc = eq.sub(p, f"{which}_conv"), eq.sub(p, f"{which}_fc")
        close(got, each(lambda f, conv=conv, fc=fc: eq.eq3_vector(f, conv, fc), x))


def test_eq4_class_weights():
    module, p = refinement(2)
    p = eq.sub(p, "class_attention")
    got = call(module.class_attention, FEATURE, CLASS_FEATURE)
    close(got, each(lambda f, m: eq.eq4_class_weights(f, m, p), FEATURE, CLASS_FEATURE))
    assert np.asarray(got).max() > 3 / (H * W)  # peaked enough for the axis to matter


def test_eq5_query_weights():
    tokens, fused = normal(5, B, 9, C), normal(6, B, H * W, C)
    close(query_attention(tokens, fused), each(eq.eq5_query_weights, tokens, fused))


def test_eq5_enhanced_tokens():
    w_c, w_q, fused = normal(7, B, 9, H * W), normal(8, B, 9, H * W), normal(9, B, H * W, C)
    got = attend_tokens(0.7, -1.3, w_c, w_q, fused)
    close(got, each(lambda *x: eq.eq5_tokens(0.7, -1.3, *x), w_c, w_q, fused))


@pytest.mark.parametrize("inter, k", [(24, 4), (6, 1), (5, 5)])
def test_selection_gathering_and_update(inter, k):
    intra, inter = normal(10, B, N, C), normal(11, B, inter, C)
    chosen = select_inter(intra, inter, k)
    np.testing.assert_array_equal(chosen, each(lambda a, b: eq.select(a, b, k), intra, inter))
    tokens = gather_tokens(intra, inter, chosen)
    expected = [eq.gather(*x) for x in zip(intra, inter, np.asarray(chosen), strict=True)]
    np.testing.assert_array_equal(tokens, expected)
    update = normal(12, *tokens.shape)
    got = scatter_tokens(intra, inter, chosen, update)
    expected = [eq.scatter(*x) for x in zip(intra, inter, np.asarray(chosen), update, strict=True)]
    for mine, theirs in zip(got, zip(*expected, strict=True), strict=True):
        close(mine, theirs)


def test_selection_is_by_cosine_not_by_inner_product():
    intra = np.array([[[1.0, 0.0]]])
    inter = np.array([[[9.0, 9.0], [0.1, 0.0], [-5.0, 0.0], [0.2, 0.1]]])
    assert select_inter(intra, inter, 3)[0, 0].tolist() == [1, 3, 0]


def test_an_inter_prototype_chosen_by_several_classes_receives_every_update():
    intra, inter = jnp.zeros((1, 3, C)), jnp.zeros((1, 4, C))
    chosen = np.array([[[1, 0], [1, 3], [3, 1]]])
    update = np.arange(1, 10, dtype=np.float32)[None, :, None] * np.ones((1, 9, C), np.float32)
    own, shared = scatter_tokens(intra, inter, chosen, update)
    assert own[0, :, 0].tolist() == [1, 4, 7]  # tokens are class-major: intra, then its two
    assert shared[0, :, 0].tolist() == [3, 2 + 5 + 9, 0, 6 + 8]


@pytest.mark.parametrize("inter, k", [(24, 4), (6, 2), (3, 3)])  # 3 of 3: every one hit N times
def test_refinement_whole(inter, k):
    module, p = refinement(k)
    intra, inter = normal(13, B, N, C), normal(14, B, inter, C)
    got = call(module, FEATURE, CLASS_FEATURE, intra, inter)
    expected = each(lambda *x: eq.ppr(*x, k, p), FEATURE, CLASS_FEATURE, intra, inter)
    for mine, theirs, before in zip(
        got[:2], zip(*expected, strict=True), (intra, inter), strict=True
    ):
        close(mine, theirs)
        close(mine - before, np.stack(theirs) - before)  # the update alone, not hidden by the sum


@few
@given(KEYS, st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_attention_weights_are_distributions_over_space(seed, scale):
    module, _ = refinement(2)
    feature, class_feature = scale * normal(seed, B, H, W, C), scale * normal(seed + 1, B, H, W, N)
    w_c = call(module.class_attention, feature, class_feature)
    w_q = query_attention(scale * normal(1, B, 9, C), feature.reshape(B, -1, C))
    for weights in map(np.asarray, (w_c, w_q)):
        assert weights.shape == (B, 9, H * W) and weights.min() >= 0
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=2e-6)


@few
@given(KEYS)
def test_enhanced_tokens_are_averages_of_the_fused_map(seed):
    """W_c and W_q sum to one over space: a constant map comes back alpha + beta times itself."""
    module, _ = refinement(2)
    w_c = call(module.class_attention, normal(seed, B, H, W, C), CLASS_FEATURE)
    w_q = query_attention(normal(seed, B, 9, C), normal(seed + 1, B, H * W, C))
    constant = np.broadcast_to(normal(seed, 1, 1, C), (B, H * W, C))
    got = attend_tokens(0.75, 0.5, w_c, w_q, constant)
    np.testing.assert_allclose(got, np.full((B, 9, 1), 1.25) * constant[:, :1], rtol=1e-5)


@few
@given(KEYS, st.sampled_from([1, 3, 6]), st.sampled_from([6, 9]))
def test_scattering_conserves_sums(seed, k, inter):
    """What the tokens carry arrives, all of it and once, whichever prototypes are hit."""
    rng = np.random.default_rng(seed)
    intra, shared = normal(seed, B, N, C), normal(seed + 1, B, inter, C)
    chosen = np.array([[rng.permutation(inter)[:k] for _ in range(N)] for _ in range(B)])
    tokens = rng.normal(size=(B, N * (k + 1), C)).astype(np.float32)
    new_intra, new_shared = scatter_tokens(intra, shared, chosen, tokens)
    new_intra, new_shared = np.asarray(new_intra), np.asarray(new_shared)
    arrived = (new_intra - intra).sum(1) + (new_shared - shared).sum(1)
    np.testing.assert_allclose(arrived, tokens.sum(1), atol=2e-5)
    missed = [[q for q in range(inter) if q not in image] for image in chosen]
    for b, rows in enumerate(missed):
        np.testing.assert_array_equal(new_shared[b, rows], shared[b, rows])


@few
@given(KEYS, st.sampled_from([1, 4, 8]))
def test_selection_ignores_lengths_and_follows_permutations(seed, k):
    rng = np.random.default_rng(seed)
    intra, inter = normal(seed, B, N, C), normal(seed + 1, B, 8, C)
    chosen = np.asarray(select_inter(intra, inter, k))
    assert all(len(set(row)) == k for image in chosen for row in image)
    lengths = np.exp2(rng.integers(-6, 7, (B, 8, 1)).astype(np.float32))
    np.testing.assert_array_equal(select_inter(8 * intra, lengths * inter, k), chosen)
    order, classes = rng.permutation(8), rng.permutation(N)
    moved = np.asarray(select_inter(intra[:, classes], inter[:, order], k))
    np.testing.assert_array_equal(order[moved], chosen[:, classes])


def permute_classes(p, order, k):
    """Parameters of PPR with the classes in another order: every weight that counts classes."""
    tokens = (order[:, None] * (k + 1) + np.arange(k + 1)).reshape(-1)
    p = dict(p)
    p["class_attention.class_conv.kernel"] = p["class_attention.class_conv.kernel"][order]
    p["class_attention.expand.kernel"] = p["class_attention.expand.kernel"][:, tokens]
    p["fuse.kernel"] = p["fuse.kernel"][np.concatenate([np.arange(C), C + order])]
    return p


@few
@given(KEYS)
def test_refinement_has_no_favorite_class(seed):
    k, order = 2, np.random.default_rng(seed).permutation(N)
    module, p = refinement(k)
    intra, inter = normal(13, B, N, C), normal(14, B, 6, C)
    expected = call(module, FEATURE, CLASS_FEATURE, intra, inter)
    permuted = reload(module, permute_classes(p, order, k))
    got = call(permuted, FEATURE, CLASS_FEATURE[..., order], intra[:, order], inter)
    assert relative(got.intra, expected.intra[:, order]) < TOLERANCE
    assert relative(got.inter, expected.inter) < TOLERANCE


def reload(module, p):
    """The same module with other parameters, from their float64 dictionary."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, eq.fill(state, p))


# Section 2.3: prototype-based prompt generator; and the class feature.


def test_prototype_affinities():
    inter, intra = normal(15, B, 6, C), normal(16, B, N, C)
    close(affinity(inter, intra), [a @ b.T for a, b in zip(inter, intra, strict=True)])


@pytest.mark.parametrize("inter", [6, 24])
def test_eq6_dense_and_eq7_sparse_prompts(inter):
    module, p = generator(inter)
    intra, inter = normal(17, B, N, C), normal(18, B, inter, C)
    sparse, dense = call(module, FEATURE, intra, inter)
    assert sparse.shape == (B, N, C) and dense.shape == (B, H, W, C)
    dense_p, sparse_p = eq.sub(p, "dense"), eq.sub(p, "sparse")
    close(dense, each(lambda *x: eq.eq6_dense(*x, dense_p), FEATURE, intra, inter))
    close(sparse, each(lambda *x: eq.eq7_sparse(*x, sparse_p), FEATURE, intra, inter))


def test_attentions_inside_eq6_and_eq7():
    """Alone, without the MLPs: Eq 6 has its softmax over prototypes, Eq 7 over space."""
    prototypes, pixels = normal(19, B, 6, C), FEATURE.reshape(B, -1, C)
    dense = dense_attention(pixels, prototypes)
    close(dense.reshape(FEATURE.shape), each(eq.eq6_attention, FEATURE, prototypes))
    close(sparse_attention(prototypes, pixels), each(eq.eq7_attention, prototypes, FEATURE))


@few
@given(KEYS, st.sampled_from([0.1, 1.0, 50.0]))
def test_prompt_attentions_average_what_they_attend_to(seed, scale):
    prototypes, pixels = normal(seed, B, 6, C), scale * normal(seed + 1, B, H * W, C)
    for got, source in (
        (dense_attention(pixels, prototypes), prototypes),
        (sparse_attention(prototypes, pixels), pixels),
    ):
        got = np.asarray(got)
        slack = 1e-5 * np.abs(source).max()
        assert np.all(got >= source.min(1, keepdims=True) - slack)
        assert np.all(got <= source.max(1, keepdims=True) + slack)


@few
@given(KEYS)
def test_prompts_follow_permutations(seed):
    """Pixels: D moves along, S stays. Classes: S moves along, D stays (with its FC's columns)."""
    rng = np.random.default_rng(seed)
    module, p = generator(6)
    intra, inter = normal(17, B, N, C), normal(18, B, 6, C)
    sparse, dense = map(np.asarray, call(module, FEATURE, intra, inter))
    pixels = rng.permutation(H * W)
    shuffled = FEATURE.reshape(B, -1, C)[:, pixels].reshape(FEATURE.shape)
    moved_sparse, moved_dense = call(module, shuffled, intra, inter)
    assert relative(moved_sparse, sparse) < TOLERANCE
    moved = dense.reshape(B, -1, C)[:, pixels].reshape(dense.shape)
    assert relative(moved_dense, moved) < TOLERANCE

    classes, others = rng.permutation(N), rng.permutation(6)
    joins = {"dense.join.kernel": classes, "sparse.join.kernel": others}
    own = np.arange(C)
    p = p | {n: p[n][np.concatenate([own, C + o])] for n, o in joins.items()}
    moved_sparse, moved_dense = call(
        reload(module, p), FEATURE, intra[:, classes], inter[:, others]
    )
    assert relative(moved_sparse, sparse[:, classes]) < TOLERANCE
    assert relative(moved_dense, dense) < TOLERANCE


def test_class_feature():
    tokens = normal(20, B, N, C)
    close(class_features(tokens, FEATURE), each(eq.class_feature, tokens, FEATURE))
    half = class_features(jnp.bfloat16(tokens), jnp.bfloat16(FEATURE))
    assert half.dtype == jnp.float32


def test_softmaxes_keep_float32_on_bfloat16_operands():
    """Half-precision operands still give float32 weights that sum to one."""
    half = jax.tree.map(jnp.bfloat16, (normal(21, B, 9, C), normal(22, B, H * W, C)))
    weights = query_attention(*half)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=2e-6)
