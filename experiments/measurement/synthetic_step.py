"""The training step of a configuration on random slices."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.measurement.points import CLASSES, SLICES
from pgpsam_jax.methods import build
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.sharded_step import shard_step, sharding_of


def random_slices(count: int, size: int) -> dict[str, np.ndarray]:
    """Returns images (count, size, size) in [0, 1) and class ids of the same shape."""
    rng, shape = np.random.default_rng(0), (count, size, size)
    images = rng.random(shape, np.float32).astype(np.float16)
    return {"image": images, "label": rng.integers(0, CLASSES, shape, np.uint8)}


class SyntheticStep:
    """The compiled step of a run, its state, and one batch that it takes again and again.

    Args:
      config: of the run.
      mesh: which the step is sharded over.
      batch_of: returns the batch, on the mesh, for a model (graphdef, params, frozen); random
        slices by default.
      epoch_size: slices of the few-shot list.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        batch_of: Callable[[tuple], dict] | None = None,
        epoch_size: int = SLICES,
    ):
        with device_mesh.traced_on(mesh):
            self.model = build.init_model(config.model, CLASSES, config.seed)[:3]
        if batch_of is None:
            slices = random_slices(config.train.batch_size, config.model.image_size)
            self.batch = device_mesh.put_batch(slices, mesh)
        else:
            self.batch = batch_of(self.model)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self.batch,
        )
        step = shard_step(
            TrainingPlan.from_config(config),
            mesh,
            *self.model,
            shapes,
            epoch_size=epoch_size,
            seed=config.seed,
        )
        start = time.perf_counter()
        lowered = step.lower()
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        self.seconds = {
            "trace_seconds": traced - start,
            "compile_seconds": time.perf_counter() - traced,
        }
        self.state = step.start(self.model[1])
        self.frozen = jax.device_put(self.model[2], sharding_of(step.frozen))

    def __call__(self, steps: int = 1) -> None:
        """Runs steps and waits for the last one."""
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))
