"""Compares the training step with and without precomputed features (`train.encoded_copies`).

The step is that of a run, on random slices. The copies are encoded before the clock starts.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmark.train_loop import config_of
from experiments.measurement.points import CLASSES
from experiments.measurement.synthetic_step import SyntheticStep, random_slices
from experiments.measurement.timing import quartiles
from pgpsam_jax.config import method_recipes
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.methods import build
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import feature_cache, step_cost
from pgpsam_jax.training.device_batches import DeviceBatches
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.train_state import init_state
from pgpsam_jax.training.train_step import make_train_step

COPIES = {"whole": 0, "encoded": 2}  # by step
SLICES, TURNS, STEPS = 24, 5, 3


def encoded_benchmark(point: dict) -> dict:
    """Returns FLOPs and seconds of both steps and their ratios, whole over encoded.

    The two take `TURNS` turns of `STEPS` steps. `ratio`: quartiles of the wall-time ratio of a
    turn. `cpu_ratio`, on a CPU: of the processor time of all threads, which other programs disturb
    less.
    """
    slices = random_slices(SLICES, _config(point, 0).model.image_size)
    runs = {name: _step_of(_config(point, n), slices) for name, n in COPIES.items()}
    for run in runs.values():
        run(STEPS)  # warm-up
    turns = [[_seconds(run) for run in runs.values()] for _ in range(TURNS)]
    wall, processor = np.moveaxis(np.array(turns), -1, 0)  # (turns, whole and encoded)
    found = dict(zip(runs, np.median(wall, axis=0).tolist(), strict=True))
    found = encoded_flops(point) | {
        "step_seconds": found,
        "ratio": quartiles(wall[:, 0] / wall[:, 1]),
    }
    if jax.default_backend() == "cpu":
        found["cpu_ratio"] = quartiles(processor[:, 0] / processor[:, 1])
    return found


def _seconds(run) -> tuple[float, float]:
    """Returns wall and processor seconds per step."""
    wall, processor = time.perf_counter(), time.process_time()
    run(STEPS)
    return (time.perf_counter() - wall) / STEPS, (time.process_time() - processor) / STEPS


def encoded_flops(point: dict) -> dict:
    """Returns FLOPs per image of both steps, counted as in `cost.json` without compiling."""
    counted = {name: _flops(_config(point, copies)) for name, copies in COPIES.items()}
    return {"flops_per_image": counted, "flops_ratio": counted["whole"] / counted["encoded"]}


def _config(point: dict, copies: int):
    config = config_of(point)
    method_recipes.apply_recipe(config, point["model"])
    config.train.batch_size, config.train.encoded_copies = point["batch"], copies
    return config


def _flops(config) -> float:
    size, count = config.model.image_size, config.train.batch_size
    graphdef, params, frozen = build.abstract_model(config.model, CLASSES)
    optimizer = TrainingPlan.from_config(config).make_optimizer(SLICES)

    def make(params, frozen, image):
        state = init_state(params, optimizer, seed=0, epoch_size=SLICES)
        return state, nnx.merge(graphdef, params, frozen).encode(to_input(image))

    image = jax.ShapeDtypeStruct((count, size, size), jnp.float16)
    state, encoded = jax.eval_shape(make, params, frozen, image)
    batch = {"label": jax.ShapeDtypeStruct(image.shape, jnp.uint8)}
    batch |= {"encoded": encoded} if config.train.encoded_copies else {"image": image}
    step = make_train_step(graphdef, optimizer, TrainingPlan.from_config(config).step)
    return step_cost.host_flops(step, state, frozen, batch) / count


def _step_of(config, slices: dict) -> SyntheticStep:
    mesh = device_mesh.make_mesh(**config.mesh)

    def batch_of(model):
        data = slices
        if config.train.encoded_copies:
            data = feature_cache.encode_few_shot_set(
                TrainingPlan.from_config(config).step, mesh, model, *slices.values(), seed=0
            )
        loader = make_loader(SLICES, batch_size=config.train.batch_size, seed=0)
        batch, _ = next(DeviceBatches(data, loader, mesh, config.data.resident_gib * 2**30))
        loader.close()
        return batch

    return SyntheticStep(config, mesh, batch_of, SLICES)
