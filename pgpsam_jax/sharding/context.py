"""`TracingContext`: the devices and the mesh axes of batch, heads and weights of a traced program.

Model code names no mesh axis, but the choice of the attention kernel depends on the device, and a
kernel that the compiler cannot partition must be split by hand. `device_mesh.traced_on` sets it.

Weights are stored in parts and gathered while a product uses them (`gather_weight`). Between
products, activations are split by rows of the batch (`split_batch`). A block of the encoder
deviates from that in two places, where heads and hidden channels are split instead (Shoeybi et al.
2019, "Megatron-LM"): its first kernel is split along its outputs, its second along its inputs, and
the one sum over devices follows the second. Everything here does nothing without a mesh.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Steps = tuple[NamedSharding, ...]


@dataclasses.dataclass(frozen=True)
class TracingContext:
    """Platform (cpu, gpu, tpu), CUDA compute capability (8.0 is Ampere, 0 none), mesh if any.

    And the mesh axes over which rows of the batch, heads, and stored weights are split.
    """

    platform: str
    capability: float = 0.0
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()
    weight_axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, device: jax.Device, **axes: Any) -> "TracingContext":
        """Returns that of a device, which may belong to a topology that is only compiled for."""
        try:
            capability = float(device.compute_capability)
        except (AttributeError, ValueError):  # no GPU, or one of another maker
            capability = 0.0
        platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        return cls(platform, capability, **axes)

    def shares(self, axes: tuple[str, ...]) -> int:
        """Returns the number of parts into which these axes split an array."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in axes)

    def spec(self, shape: Sequence[int], split: dict[int, tuple[str, ...]]) -> PartitionSpec:
        """Returns the spec that splits dimensions over mesh axes where they divide."""
        axes = (split.get(i, ()) for i in range(len(shape)))
        return PartitionSpec(
            *(
                names if names and size % self.shares(names) == 0 else None
                for size, names in zip(shape, axes, strict=True)
            )
        )


_current: contextvars.ContextVar[TracingContext | None] = contextvars.ContextVar(
    "placement", default=None
)


def current() -> TracingContext:
    """Returns the context set by `traced_for`, or that of the default backend's first device."""
    return _current.get() or TracingContext.of(jax.devices()[0])


@contextlib.contextmanager
def traced_for(placement: TracingContext) -> Iterator[None]:
    """Sets the context of functions that are traced inside the block."""
    token = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(token)


def split_batch(x: jax.Array) -> jax.Array:
    """Constrains activations (B, ...): rows over the batch axes, all else replicated."""
    here = _current.get()
    if here is None or here.mesh is None or here.mesh.size == 1:
        return x
    if x.shape[0] % here.shares(here.batch_axes):  # no constraint: replicating would be worse
        return x
    spec = here.spec(x.shape, {0: here.batch_axes})
    return jax.lax.with_sharding_constraint(x, NamedSharding(here.mesh, spec))


def gather_weight(weight: jax.Array) -> jax.Array:
    """Gathers a weight. Cast it first: the argument is communicated, its gradient is not."""
    steps = gather_shardings(weight.shape)
    return _gather_weight(weight, steps) if steps else weight


def gather_shardings(
    shape: Sequence[int], split: int | None = None, stored: int | None = None
) -> Steps:
    """Returns the shardings, in order, from a stored weight to a product's; () without a mesh.

    split: the dimension that is then split over the head axes. stored: the dimension that is split
    over them before, if another; the parts are exchanged.
    """
    here = _current.get()
    if here is None or here.mesh is None or here.shares(here.weight_axes) == 1:
        return ()
    dimensions = (split,) if stored is None else (stored, split)
    splits = ({} if dimension is None else {dimension: here.head_axes} for dimension in dimensions)
    # First as it is stored: otherwise the compiler would lay out what precedes like what follows,
    # and gather float32 to cast it on every device.
    stays = PartitionSpec(*(PartitionSpec.UNCONSTRAINED for _ in shape))
    specs = (stays, *(here.spec(shape, axes) for axes in splits))
    return tuple(NamedSharding(here.mesh, spec) for spec in specs)


def apply_shardings(x: jax.Array, steps: Steps) -> jax.Array:
    """Applies the shardings `steps` to x, one after the other."""
    for sharding in steps:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_weight(weight: jax.Array, steps: Steps) -> jax.Array:
    return apply_shardings(weight, steps)


# The transpose of a constraint is the same one: every device would hold full gradients.
_gather_weight.defvjp(
    lambda weight, steps: (apply_shardings(weight, steps), None),
    lambda steps, _, gradient: (gradient,),
)


def per_device(kernel: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """Runs kernel(*operands) on (B, N, ...) arrays, each device on its share of batch and heads.

    An axis that does not divide is replicated: its devices then compute the same.
    """
    here = current()
    if here.mesh is None or here.mesh.size == 1:
        return kernel(*operands)
    spec = here.spec(operands[0].shape[:2], {0: here.batch_axes, 1: here.head_axes})
    split = jax.shard_map(
        kernel, mesh=here.mesh, in_specs=(spec,) * len(operands), out_specs=spec, check_vma=False
    )
    return split(*operands)
