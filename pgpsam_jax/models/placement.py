"""What a program is traced for: its devices, and the mesh axes that batch and heads lie on.

Model code names no mesh axis, yet which attention kernel suits depends on the device, and a kernel
that the compiler cannot partition must be split by hand. Whoever compiles a step says so here.
"""

import contextlib
import contextvars
import dataclasses

import jax
from jax.sharding import Mesh, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Placement:
    """Platform (cpu, gpu, tpu), CUDA compute capability (8.0 is Ampere, 0 none), mesh if any."""

    platform: str
    capability: float = 0.0
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, device, **axes) -> "Placement":
        """That of a device, which may be one of a topology that is only compiled for."""
        try:
            capability = float(device.compute_capability)
        except (AttributeError, ValueError):  # no GPU, or one of another maker
            capability = 0.0
        platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        return cls(platform, capability, **axes)


_current: contextvars.ContextVar[Placement | None] = contextvars.ContextVar(
    "placement", default=None
)


def current() -> Placement:
    """What is being traced for; the default backend's first device where nobody said so."""
    return _current.get() or Placement.of(jax.devices()[0])


@contextlib.contextmanager
def traced_for(placement: Placement):
    """Functions traced inside are for this placement."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)


def per_device(kernel, *operands):
    """kernel(*operands) on (B, N, ...) arrays, on every device its share of batch and heads.

    An axis that does not divide stays whole: its devices then compute the same.
    """
    here = current()
    if here.mesh is None or here.mesh.size == 1:
        return kernel(*operands)
    b, n = operands[0].shape[:2]
    axes = []
    for size, names in ((b, here.batch_axes), (n, here.head_axes)):
        shares = 1
        for name in names:
            shares *= here.mesh.shape[name]
        axes.append(names if size % shares == 0 else None)
    spec = PartitionSpec(*axes)
    split = jax.shard_map(
        kernel, mesh=here.mesh, in_specs=(spec,) * len(operands), out_specs=spec, check_vma=False
    )
    return split(*operands)
