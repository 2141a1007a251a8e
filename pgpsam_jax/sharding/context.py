"""What a program is traced for: its devices, and the mesh axes of batch, heads and weights.

Model code names no mesh axis, yet which attention kernel suits depends on the device, and a kernel
that the compiler cannot partition must be split by hand. Whoever compiles a step says so here.

Weights are stored in parts and are whole only while a product takes them: `gathered`. Between
products, activations are split by rows of the batch: `split_batch`. A block of the encoder leaves
that in two places, where heads and hidden channels are split instead (Shoeybi et al. 2019,
"Megatron-LM"): its first kernel is split along its outputs, its second along its inputs, and the
sum over devices comes once, behind the second. Everything here does nothing without a mesh.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Placement:
    """Platform (cpu, gpu, tpu), CUDA compute capability (8.0 is Ampere, 0 none), mesh if any.

    The axes of the mesh that rows of the batch, heads, and parts of stored weights lie on.
    """

    platform: str
    capability: float = 0.0
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    head_axes: tuple[str, ...] = ()
    weight_axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, device, **axes) -> "Placement":
        """That of a device, which may be one of a topology that is only compiled for."""
        try:
            capability = float(device.compute_capability)
        except (AttributeError, ValueError):  # no GPU, or one of another maker
            capability = 0.0
        platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        return cls(platform, capability, **axes)

    def shares(self, axes: tuple[str, ...]) -> int:
        """Into how many parts these axes split an array."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in axes)

    def spec(self, shape, split: dict[int, tuple[str, ...]]) -> PartitionSpec:
        """Dimensions over mesh axes, where they divide; the others are whole."""
        axes = (split.get(i, ()) for i in range(len(shape)))
        return PartitionSpec(
            *(
                names if names and size % self.shares(names) == 0 else None
                for size, names in zip(shape, axes, strict=True)
            )
        )


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


def split_batch(x):
    """Activations (B, ...): rows on the batch axes, all else whole on every device."""
    here = _current.get()
    if here is None or here.mesh is None or here.mesh.size == 1:
        return x
    if x.shape[0] % here.shares(here.batch_axes):  # nothing is asked for: whole would be worse
        return x
    spec = here.spec(x.shape, {0: here.batch_axes})
    return jax.lax.with_sharding_constraint(x, NamedSharding(here.mesh, spec))


def gathered(weight):
    """A weight, whole. Cast it first: what travels is the argument; its gradient does not."""
    steps = gathering(weight.shape)
    return _gathered(weight, steps) if steps else weight


def gathering(shape, split: int | None = None, stored: int | None = None) -> tuple:
    """Steps for `in_steps` from a stored weight to one that a product takes; none without a mesh.

    split: the dimension that devices which share heads then have in parts. stored: the one that
    they have in parts before, if another; the parts are exchanged.
    """
    here = _current.get()
    if here is None or here.shares(here.weight_axes) == 1:
        return ()
    dimensions = (split,) if stored is None else (stored, split)
    splits = ({} if dimension is None else {dimension: here.head_axes} for dimension in dimensions)
    # First as it is stored, whatever that be: the compiler would lay out what comes before like
    # what comes after, and gather float32 to cast it on every device.
    stays = PartitionSpec(*(PartitionSpec.UNCONSTRAINED for _ in shape))
    specs = (stays, *(here.spec(shape, axes) for axes in splits))
    return tuple(NamedSharding(here.mesh, spec) for spec in specs)


def in_steps(x, steps: tuple):
    """x laid out as each of `steps` says, one after the other."""
    for sharding in steps:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight, steps):
    return in_steps(weight, steps)


# The transpose of a constraint is the same one: every device would hold whole gradients.
_gathered.defvjp(
    lambda weight, steps: (in_steps(weight, steps), None),
    lambda steps, _, gradient: (gradient,),
)


def per_device(kernel, *operands):
    """kernel(*operands) on (B, N, ...) arrays, on every device its share of batch and heads.

    An axis that does not divide stays whole: its devices then compute the same.
    """
    here = current()
    if here.mesh is None or here.mesh.size == 1:
        return kernel(*operands)
    spec = here.spec(operands[0].shape[:2], {0: here.batch_axes, 1: here.head_axes})
    split = jax.shard_map(
        kernel, mesh=here.mesh, in_specs=(spec,) * len(operands), out_specs=spec, check_vma=False
    )
    return split(*operands)
