"""LoRA on the fused qkv projection (Hu et al. 2021; SAMed's choice of q and v, scale 1)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.models.initializers import array, sample
from pgpsam_jax.sharding.matmul import matmul

TARGETS = ("q", "k", "v")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank of the update and which of q, k, v it is added to; rank 0 means none."""

    rank: int = 4
    targets: tuple[str, ...] = ("q", "v")


class LoraQKV(nnx.Module):
    """Low-rank update of a projection to q, k, v, (..., D) to (..., 3, D): x A_t B_t (else zeros).

    A starts uniform in +-1/sqrt(D) (PyTorch's linear default), B at zero, no alpha/rank scaling.
    """

    def __init__(self, dim: int, config: LoraConfig, *, dtype, rngs: nnx.Rngs):
        count, bound = len(config.targets), dim**-0.5
        shape = (count, dim, config.rank)
        self.a = nnx.LoRAParam(array(bound * (2 * sample(rngs, shape, "uniform") - 1)))
        self.b = nnx.LoRAParam(array(np.zeros((count, config.rank, dim))))
        self.targets = config.targets
        self.dtype = dtype

    def __call__(self, x):
        a, b = self.a[...].astype(self.dtype), self.b[...].astype(self.dtype)
        update = {t: matmul(matmul(x, a[i]), b[i]) for i, t in enumerate(self.targets)}
        zero = jnp.zeros(x.shape, self.dtype)
        return jnp.stack([update.get(t, zero) for t in TARGETS], axis=-2)
