"""The step of a point in JAX, compiled ahead of time."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmark import random_weights, sam_jax
from experiments.benchmark.points import Point
from experiments.measurement.device_info import device_info
from experiments.measurement.points import CLASSES, SLICES
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.profiling import flops

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Step:
    """A compiled step: a call runs it once and waits. `facts` are known before the first call."""

    def __init__(self, point: dict):
        point = Point(**point)
        device = jax.devices()[0]
        make = _sam if point.model == "sam" else _pgpsam
        function, donated, self._arguments, self._feed_back, counted = make(point)
        start = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=donated).lower(*self._arguments)
        traced = time.perf_counter()
        self._compiled = lowered.compile()
        memory = self._compiled.memory_analysis()
        self.facts = {
            **device_info(device),
            "trace_seconds": traced - start,
            "compile_seconds": time.perf_counter() - traced,
            **_flops(counted, point.task),
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "aliased_bytes": memory.alias_size_in_bytes,
        }
        self._arguments = jax.device_put(self._arguments, device)

    def __call__(self) -> None:
        out = jax.block_until_ready(self._compiled(*self._arguments))
        self._arguments = self._feed_back(out, self._arguments)

    def peak_bytes(self) -> int | None:
        """Returns the peak of the device's memory; None on a CPU, where the process counts."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _flops(counted, task: str) -> dict:
    found = flops.total(counted)
    if task == "training":
        needed, padding = found.training, found.training_padding
    else:
        needed, padding = found.forward, found.forward_padding
    return {"flops_per_image": needed, "padding_flops_per_image": padding}


def _keep(out, arguments):
    return arguments


def _sam(point: Point):
    settings, size = point.settings, point.image_size
    config = SamConfig.preset(point.encoder, size, point.patch_size, **settings)
    graphdef, params, frozen = sam_jax.build(config, _DTYPES[point.dtype])
    images, labels = random_weights.batch(point.batch, size, random_weights.CLASSES, channels=True)
    if point.task == "encoder":
        counted = flops.encoder(config.encoder, sam_jax.LORA, "lora")
    else:
        counted = flops.sam(config.encoder, config.decoder, sam_jax.LORA, "lora")
    if point.task == "training":
        optimizer, train_step = sam_jax.make_train_step(graphdef)
        arguments = (params, optimizer.init(params), frozen, images, labels)
        return train_step, (0, 1), arguments, lambda out, old: (*out[:2], *old[2:]), counted

    run = sam_jax.encode if point.task == "encoder" else sam_jax.predict

    def forward(params, frozen, images):
        return run(graphdef, params, frozen, images)

    return forward, (), (params, frozen, images), _keep, counted


def _pgpsam(point: Point):
    # Imported here: the model `sam` needs none of them.
    from pgpsam_jax.inference.predictor import make_predict_step
    from pgpsam_jax.methods import build
    from pgpsam_jax.models.segmenter import to_input
    from pgpsam_jax.training.plan import TrainingPlan
    from pgpsam_jax.training.train_state import init_state
    from pgpsam_jax.training.train_step import make_train_step

    config, task, batch_size = point.config(), point.task, point.batch
    model = build.make_model(config.model, CLASSES, nnx.Rngs(0))
    sizes = model.config
    images, labels = random_weights.batch(batch_size, point.image_size, CLASSES, channels=False)
    if task == "encoder":
        graphdef, state = nnx.split(model.image_encoder)
        counted = flops.encoder(sizes.sam.encoder, sizes.lora, "lora")

        def encode(state, images):
            return nnx.merge(graphdef, state)(to_input(images))[0]

        return encode, (), (state, images), _keep, counted

    graphdef, params, frozen = build.split_model(model, "lora")
    counted = flops.pgpsam(sizes, "lora", training=task == "training")
    if task == "inference":
        return make_predict_step(graphdef), (), (params, frozen, images), _keep, counted
    optimizer = TrainingPlan.from_config(config).make_optimizer(SLICES)
    state = init_state(params, optimizer, seed=0, epoch_size=SLICES)
    batch = {"image": images, "label": labels.astype(np.uint8)}
    train_step = make_train_step(graphdef, optimizer, TrainingPlan.from_config(config).step)
    return train_step, (0,), (state, frozen, batch), lambda out, old: (out[0], *old[1:]), counted
