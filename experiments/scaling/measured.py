"""Runs one point on the first of the local devices, with synthetic data."""

import jax
from flax import nnx

from experiments.measurement import peak_memory
from experiments.measurement.device_info import device_info
from experiments.measurement.synthetic_step import SyntheticStep
from experiments.scaling.points import Measured
from pgpsam_jax.profiling import aot, flops
from pgpsam_jax.sharding import rules
from pgpsam_jax.training import plan


def count_devices() -> dict:
    """Returns `count` and `platform` of the local devices."""
    found = jax.local_devices()
    return {"count": len(found), "platform": found[0].platform}


class Step:
    """The sharded training step; calling it runs one step and waits. `facts`: known beforehand."""

    def __init__(self, point: dict):
        point = Measured(**point)
        self._devices = jax.devices()[: point.devices]
        config = point.config(point.devices)
        mesh = plan.mesh_of(config.mesh, config.model, config.train.batch_size, self._devices)
        self._step = SyntheticStep(config, mesh)
        sizes = nnx.merge(*self._step.model).config
        known = device_info(self._devices[0])
        self.facts = {
            **dict(zip(rules.AXES, mesh.devices.shape, strict=True)),
            "global_batch": config.train.batch_size,
            "device": known["device"],
            "platform": known["platform"],
            **self._step.seconds,
            "flops_per_image": flops.total(flops.pgpsam(sizes, "lora", training=True)).training,
            "planned_bytes": aot.compiled_cost(self._step.compiled).total,
        }

    def __call__(self) -> None:
        self._step()

    def peak_bytes(self) -> float | None:
        """Returns the peak of the fullest device; on a CPU, each device's share of the process."""
        stats = [device.memory_stats() or {} for device in self._devices]
        if all("peak_bytes_in_use" in one for one in stats):
            return max(one["peak_bytes_in_use"] for one in stats)
        resident = peak_memory.peak_resident()
        return None if resident is None else resident / len(self._devices)
