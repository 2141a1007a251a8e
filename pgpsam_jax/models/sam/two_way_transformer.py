"""SAM's two-way transformer: tokens attend to the image and the image to the tokens.

Letters: B batch, T tokens, L = H*W image positions, D width, N heads, C head dim.
Source: Kirillov et al. 2023, appendix A ("Lightweight mask decoder").
"""

import jax
from flax import nnx

from pgpsam_jax.models import layers
from pgpsam_jax.models.sam.attention_kernels import attend


class Attention(nnx.Module):
    """Multi-head attention with projections that may shrink the width by `downsample`."""

    def __init__(self, dim: int, heads: int, downsample: int, *, dtype, rngs: nnx.Rngs):
        inner = dim // downsample
        self.q_proj = layers.Linear(dim, inner, dtype=dtype, rngs=rngs)
        self.k_proj = layers.Linear(dim, inner, dtype=dtype, rngs=rngs)
        self.v_proj = layers.Linear(dim, inner, dtype=dtype, rngs=rngs)
        self.out_proj = layers.Linear(inner, dim, dtype=dtype, rngs=rngs)
        self.heads = heads

    def _split(self, x):
        b, t, d = x.shape
        return x.reshape(b, t, self.heads, d // self.heads).swapaxes(1, 2)

    def similar(self, q, k):
        """Projected queries and keys as their inner products compare them; a subclass may."""
        return q, k

    def __call__(self, q, k, v, gate=None):
        """q (B, T, D), k and v (B, L, D) to (B, T, D); gate: see `attention_kernels.attend`."""
        q, k = self.similar(self.q_proj(q), self.k_proj(k))
        q, k, v = self._split(q), self._split(k), self._split(self.v_proj(v))
        out = attend(q * q.shape[-1] ** -0.5, k, v, gate)
        b, n, t, c = out.shape
        return self.out_proj(out.swapaxes(1, 2).reshape(b, t, n * c))


class TwoWayBlock(nnx.Module):
    """Token self-attention, token-to-image, MLP, image-to-token; a LayerNorm after each."""

    token_to_image: type[Attention] = Attention
    index = 0  # of the block, where its draws depend on it

    def __init__(self, dim, heads, mlp_dim, downsample, *, first: bool, dtype, rngs: nnx.Rngs):
        norm = dict(eps=layers.DECODER_EPS, dtype=dtype, rngs=rngs)
        attend = dict(dtype=dtype, rngs=rngs)
        self.self_attn = Attention(dim, heads, 1, **attend)
        self.norm1 = layers.LayerNorm(dim, **norm)
        self.cross_attn_token_to_image = self.token_to_image(dim, heads, downsample, **attend)
        self.norm2 = layers.LayerNorm(dim, **norm)
        self.mlp = layers.MlpBlock(dim, mlp_dim, activation=jax.nn.relu, dtype=dtype, rngs=rngs)
        self.norm3 = layers.LayerNorm(dim, **norm)
        self.norm4 = layers.LayerNorm(dim, **norm)
        self.cross_attn_image_to_token = Attention(dim, heads, downsample, **attend)
        self.first = first

    def attend_tokens(self, tokens, token_pe):
        """Self-attention; the first block replaces the tokens: no position and no residual."""
        if self.first:
            return self.self_attn(tokens, tokens, tokens)
        q = tokens + token_pe
        return tokens + self.self_attn(q, q, tokens)

    def __call__(self, tokens, image, token_pe, image_pe):
        tokens = self.norm1(self.attend_tokens(tokens, token_pe))
        q, k = tokens + token_pe, image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(q, k, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        q = tokens + token_pe
        image = self.norm4(image + self.cross_attn_image_to_token(k, q, tokens))
        return tokens, image


class TwoWayTransformer(nnx.Module):
    """`depth` two-way blocks and a final token-to-image attention."""

    block = TwoWayBlock

    def __init__(self, dim, depth, heads, mlp_dim, downsample, *, dtype, rngs: nnx.Rngs):
        self.layers = nnx.List(
            self.block(dim, heads, mlp_dim, downsample, first=i == 0, dtype=dtype, rngs=rngs)
            for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(dim, heads, downsample, dtype=dtype, rngs=rngs)
        self.norm_final_attn = layers.LayerNorm(dim, eps=layers.DECODER_EPS, dtype=dtype, rngs=rngs)

    def __call__(self, image, image_pe, tokens, token_pe=None, *gate):
        """image and image_pe (B, L, D), tokens (B, T, D); in SAM the tokens are their own PE.

        gate: what the blocks of a subclass take besides.
        """
        token_pe = tokens if token_pe is None else token_pe
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, *gate)
        update = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + update), image
