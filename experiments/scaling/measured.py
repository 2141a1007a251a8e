"""One point run on the first of the devices at hand, with synthetic data."""

import time

import jax
import numpy as np
from flax import nnx

from experiments.benchmark.steps_jax import where
from experiments.measurement import peak_memory
from experiments.scaling.points import CLASSES, SLICES, Measured
from pgpsam_jax.methods import build
from pgpsam_jax.profiling import flops
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import from_config
from pgpsam_jax.training.sharded_step import shard_step, sharding_of


class Step:
    """`step()` runs the sharded training step once and waits; `facts` is known before the first."""

    def __init__(self, point: Measured):
        devices = jax.devices()[: point.devices]
        config = point.config(point.devices)
        mesh = from_config.mesh_of(config, devices)
        size, images = config.model.image_size, config.train.batch_size
        model = device_mesh.over_mesh(build.init_model, mesh)(config, CLASSES)[:3]
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.random((images, size, size), np.float32).astype(np.float16),
            "label": rng.integers(0, CLASSES, (images, size, size), np.uint8),
        }
        batch = device_mesh.put_batch(batch, mesh)
        step = shard_step(config, mesh, *model, batch, epoch_size=SLICES, seed=config.seed)
        start = time.perf_counter()
        lowered = step.run.lower(step.state, step.frozen, _shapes(batch))
        traced = time.perf_counter()
        self._compiled = lowered.compile()
        compiled = time.perf_counter()
        planned = self._compiled.memory_analysis()
        self._state = step.start(model[1])
        self._fixed = jax.device_put(model[2], sharding_of(step.frozen)), batch
        self._devices = devices
        needed = flops.total(flops.pgpsam(nnx.merge(*model).config, "lora", training=True))
        known = where(devices[0])
        self.facts = {
            **dict(zip(device_mesh.AXES, mesh.devices.shape, strict=True)),
            "global_batch": images,
            "device": known["device"],
            "platform": known["platform"],
            "trace_seconds": traced - start,
            "compile_seconds": compiled - traced,
            "flops_per_image": needed.training,
            "planned_bytes": planned.argument_size_in_bytes
            + planned.temp_size_in_bytes
            + planned.output_size_in_bytes
            - planned.alias_size_in_bytes,
        }

    def __call__(self) -> None:
        self._state, metrics = self._compiled(self._state, *self._fixed)
        jax.block_until_ready(metrics)

    def peak_bytes(self) -> float | None:
        """Of the device with most; on a CPU, the process's share of each device."""
        counts = [
            (device.memory_stats() or {}).get("peak_bytes_in_use") for device in self._devices
        ]
        if None not in counts:
            return max(counts)
        resident = peak_memory.peak_resident()
        return None if resident is None else resident / len(self._devices)


def _shapes(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
