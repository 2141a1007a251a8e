"""The cost of a run: parameters, FLOPs, memory and time, kept in `<workdir>/cost.json`.

FLOPs are XLA's count before device-specific optimization, hence independent of device and mesh: a
multiply-add is two, any elementwise operation one. XLA counts loop bodies once; the products of
the further iterations are added. (XLA's count after optimization differs by 2 % on CPU and omits
cuBLAS products on GPU, JAX issue 22249.) Bytes of a step are the compiler's plan for one device;
peaks are measured in this process (the first of several).

`kind` is "training", "fit" (L-BFGS: FLOPs depend on the number of iterations and are omitted) or
"none" (no trainable parameters: only inference has a cost).
"""

import inspect
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from pgpsam_jax.distributed import multihost
from pgpsam_jax.inference.predictor import make_predict_step
from pgpsam_jax.methods import registry
from pgpsam_jax.models.parameters import count
from pgpsam_jax.sharding.context import TracingContext, traced_for
from pgpsam_jax.utils import files
from pgpsam_jax.utils.files import write_json

FILE = "cost.json"
_SETTING = ("devices", "compute_dtype", "image_size", "batch_size", "flops_per_image")


def describe_step(
    settings: ConfigDict,
    mesh,
    graphdef,
    train_step,
    arguments,
    traced,
    lowered,
    compiled: jax.stages.Compiled,
    slices: int,
) -> dict:
    """Returns the cost of a train step, as known before the first one.

    Args:
      settings: `config.model`.
      mesh: the devices.
      graphdef: of the model.
      train_step: the jitted step: augmentation, forward and backward pass, update.
      arguments: shapes of its (state, frozen, batch).
      traced, lowered, compiled: its stages for these shapes.
      slices: images per step, by which FLOPs are divided.
    """
    state, frozen, _ = arguments
    record = _of_model(settings, mesh, graphdef, state.params, frozen)
    memory = compiled.memory_analysis()
    if record["kind"] == "training":
        counted = flops_of(traced, lowered)
        if counted is None:  # devices behind a plugin
            counted = host_flops(inspect.unwrap(train_step), *arguments)
        record["flops_per_image"]["training"] = None if counted is None else counted / slices
    if memory is not None:  # None for devices behind a plugin that does not plan
        record["step_bytes"] = {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,  # outputs that reuse arguments' memory
        }
    return record | {"batch_size": slices}


def describe_inference(settings: ConfigDict, mesh, graphdef, params, frozen) -> dict:
    """Like `describe_step`, for methods without trainable parameters."""
    return _of_model(settings, mesh, graphdef, params, frozen)


def _of_model(settings: ConfigDict, mesh, graphdef, params, frozen) -> dict:
    """The part that does not depend on the step."""
    size, device = settings.image_size, mesh.devices.flat[0]
    method = registry.method_of(settings)
    image = jax.ShapeDtypeStruct((1, size, size), jnp.float32)
    given = [jax.ShapeDtypeStruct((1, size, size), jnp.uint8)] if method.oracle else []
    forward = host_flops(make_predict_step(graphdef), params, frozen, image, *given)
    return {
        "kind": method.training.value,
        "devices": {
            "count": mesh.devices.size,
            "kind": device.device_kind,
            "platform": device.platform,
        },
        "compute_dtype": settings.compute_dtype,
        "image_size": size,
        "batch_size": None,
        "parameters": {"trained": count(params), "frozen": count(frozen)},
        "flops_per_image": {"forward": forward, "training": None},
        "step_bytes": None,
    }


def host_flops(function, *arguments) -> float | None:
    """Returns the FLOPs of a pure function of arrays or shapes, lowered for the CPU.

    None if JAX may not use the CPU (`JAX_PLATFORMS`).
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    with jax.default_device(host), traced_for(TracingContext("cpu")):
        traced = jax.jit(function).trace(*shapes)
        return flops_of(traced, traced.lower())


def flops_of(traced, lowered) -> float | None:
    """Returns XLA's count of a program plus the products of further loop iterations.

    Loops are microbatches, `model.scan_blocks`, and attention in chunks.
    """
    counted = (lowered.cost_analysis() or {}).get("flops")
    return None if counted is None else counted + _further_rounds(traced.jaxpr.jaxpr)


def _further_rounds(jaxpr, rounds: int = 1) -> float:
    """FLOPs of the matrix products in loops of known length, without the first iterations."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and rounds > 1:
            contracted = equation.params["dimension_numbers"][0][0]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * (rounds - 1) * math.prod(equation.outvars[0].aval.shape) * depth
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += _further_rounds(inner, rounds * length)
    return total


def summarize_steps(records: list[dict], batch_size: int, first: int = 0) -> dict:
    """Returns seconds per step between records after step `first`, and memory peaks.

    The rates in `metrics.jsonl` exclude compiling, saving and validating.

    Args:
      records: of `metrics.jsonl`.
      batch_size: slices per step.
      first: step after which to measure.
    """
    rates = [record["images_per_second"] for record in records if record["step"] > first]
    seconds = [batch_size / rate for rate in rates if rate > 0]
    peaks = {"process": _process_peak(), "device": _device_peak()}
    if not seconds:
        return {"peak_bytes": peaks}
    low, median, high = np.percentile(seconds, (25, 50, 75)).tolist()
    times = {"median": median, "quartiles": [low, high], "intervals": len(seconds)}
    return {"peak_bytes": peaks, "step_seconds": times}


def start_record(workdir, record: dict, step: int) -> None:
    """Stores a record of `describe_step` for a run that starts or resumes after `step`.

    Steps are timed from there, or from an earlier start with the same settings.
    """
    earlier, timed_from = read_record(workdir), step
    if all(earlier.get(key) == record[key] for key in _SETTING):
        timed_from = earlier["timed_from"]
    _store(workdir, record | {"timed_from": timed_from})


def update_record(workdir, records: list[dict]) -> None:
    """Adds the measured times and peaks to the record of `start_record`."""
    if record := read_record(workdir):
        spent = summarize_steps(records, record["batch_size"], record["timed_from"])
        _store(workdir, record | spent)


def read_record(workdir) -> dict:
    """Returns the record of a workdir; {} if missing or damaged."""
    return files.read_record(Path(workdir) / FILE, missing={}, damaged={})


def _store(workdir, record: dict) -> None:
    if multihost.is_first():
        write_json(Path(workdir) / FILE, record)


def _process_peak() -> int | None:
    """Peak resident bytes of this process, including compilation and data loading."""
    try:
        import resource
    except ImportError:  # no such count on this system
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _device_peak() -> int | None:
    """Peak bytes in use on a local device; None if devices do not count them."""
    counts = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((c["peak_bytes_in_use"] for c in counts if "peak_bytes_in_use" in c), default=None)
