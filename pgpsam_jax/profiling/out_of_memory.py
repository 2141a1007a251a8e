"""Suggestions for out-of-memory errors: what the train step needs, and which settings need less.

All numbers are the compiler's plan for one device (`aot.CompiledCost.total`) of the actual step:
each setting is compiled for the current mesh, without weights on a device. A step of SAM's size
takes most of a minute to compile, so the cheapest remedies come first, and the search ends once
enough of them fit or its time is up.
"""

import contextlib
import functools
import gc
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import locations
from pgpsam_jax.config import serialization
from pgpsam_jax.data import dataset
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.profiling import accelerators, aot
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.plan import TrainingPlan, mesh_of

SECONDS = 240  # time limit of the search
ENOUGH = 3  # fitting settings end the search
_EXHAUSTED = "RESOURCE_EXHAUSTED"
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_BYTES_PER_PIXEL = 3  # of the few-shot set: float16 gray value, uint8 label


class Remedy(NamedTuple):
    """Settings that may need less memory (field -> value), and their price."""

    settings: dict
    price: str

    @property
    def flags(self) -> str:
        """The settings as command-line flags."""
        return " ".join(f"--config.{field}={value}" for field, value in self.settings.items())

    def applied(self, config: ConfigDict) -> ConfigDict:
        """Returns a copy of the configuration with the settings."""
        config = config.copy_and_resolve_references()
        config.update_from_flattened_dict(self.settings)
        return config


@contextlib.contextmanager
def oom_to_user_error(config: ConfigDict | None, workdir):
    """Converts out-of-memory errors inside the block to a `UserError` with suggestions.

    Args:
      config: of the run; None for the workdir's.
      workdir: of the run.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _EXHAUSTED not in str(error):
            raise
        reason, segmenting = _reason(error), _was_segmenting(error)
        # The traceback's frames keep the run's arrays alive, and compiling needs memory too.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        config = serialization.load_config(workdir) if config is None else config
        raise UserError(advice(config, workdir, reason, segmenting)) from None


def advice(config: ConfigDict, workdir, reason: str, segmenting: bool = False) -> str:
    """Returns one sentence on the fault, and one line per suggestion.

    Args:
      config: of the run.
      workdir: of the run.
      reason: of the device.
      segmenting: whether it happened in validation or evaluation, not in a train step.
    """
    if segmenting:
        size = config.eval.batch_size
        smaller = f"choose --config.eval.batch_size={size // 2} or less, it is {size}"
        remedy = (
            smaller if size > 1 else "the batch is a single slice: use a device with more memory"
        )
        return f"a device ran out of memory while volumes were segmented ({reason}); {remedy}"
    head = f"a device ran out of memory ({reason})"
    remedies = list_remedies(config)
    if multihost.is_multiprocess():  # compiling takes all processes, and the others are stuck
        listed = "\n".join(f"  {remedy.flags}  ({remedy.price})" for remedy in remedies)
        return f"{head}; settings that need less, cheapest first:\n{listed}"
    minutes = SECONDS // 60
    multihost.print_once(f"{head}: looking for settings that fit, for {minutes} minutes at most")
    resident = _resident_bytes(config.model.image_size, config.data.resident_gib, workdir)
    classes = dataset.label_table(locations.resolve_paths(config, workdir).data).num_classes

    measure = functools.partial(step_bytes, classes=classes, resident=resident)
    device = jax.local_devices()[0]
    needs, limit = measure(config), memory_limit(device)
    found = measure_remedies([(r, r.applied(config)) for r in remedies], needs, limit, measure)
    return _listed(head, needs, limit, device.device_kind, found)


def _listed(head: str, needs: int, limit, kind: str, remedies) -> str:
    """Formats sentence and list from the bytes needed and the device's (None: unknown)."""
    room = f", and {kind} offers {format_bytes(limit)}" if limit else ""
    text = f"{head}: a training step needs {format_bytes(needs)} on each device{room}"
    if limit and needs < limit:
        text += (
            ", which should fit: check whether another program uses the device, or give JAX more "
            "of it with XLA_CLIENT_MEM_FRACTION=0.95"
        )
    lines = []
    for remedy, size in remedies:
        verdict = "not compiled for lack of time" if size is None else format_bytes(size)
        if limit and size is not None:
            verdict += ", fits" if size < limit else ", still too much"
        lines.append(f"  {remedy.flags}  ->  {verdict} ({remedy.price})")
    if not lines:
        return f"{text}; no setting that needs less was found: use a device with more memory"
    return "\n".join([f"{text}; what would help:", *lines])


def measure_remedies(
    remedies: list[tuple[Remedy, ConfigDict]],
    needs: int,
    limit: int | None,
    measure: Callable[[ConfigDict], int],
) -> Iterator[tuple[Remedy, int | None]]:
    """Yields each remedy that needs less memory, with its bytes, until enough of them fit.

    Args:
      remedies: with the configurations they lead to, the cheapest first.
      needs: bytes the present configuration needs.
      limit: bytes of the device; None if unknown.
      measure: configuration -> bytes. Remedies get None instead once time has run out.
    """
    start, fits, longest = time.monotonic(), 0, 0.0
    for remedy, applied in remedies:
        before = time.monotonic()
        if before - start + longest > SECONDS:
            yield remedy, None
            continue
        size = measure(applied)
        longest = max(longest, time.monotonic() - before)
        if size >= needs:
            continue
        yield remedy, size
        fits += limit is not None and size < limit
        if fits == ENOUGH:
            return


def list_remedies(config: ConfigDict) -> list[Remedy]:
    """Returns settings that need less memory, the cheapest first, another recipe last."""
    batch, parts, mesh = (
        config.train.batch_size,
        config.train.microbatches,
        device_mesh.make_mesh(**config.mesh),
    )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    found = []
    together: dict[str, object] = {}
    if config.model.remat != "blocks":
        together["model.remat"] = "blocks"
        found.append(Remedy({"model.remat": "blocks"}, "the same results, a slower step"))
    if shards > mesh.shape["fsdp"]:
        spread = {"mesh.data": 1, "mesh.fsdp": shards}
        found.append(Remedy(spread, "the same results, weights in parts over the devices"))
    if config.model.compute_dtype != "bfloat16":
        together["model.compute_dtype"] = "bfloat16"
        found.append(Remedy({"model.compute_dtype": "bfloat16"}, "faster on GPU and TPU, rounded"))
    divided = [n for n in range(2 * parts, batch + 1, parts) if batch % (n * shards) == 0]
    if divided:
        together["train.microbatches"] = divided[-1]
        price = "the same batch in parts, more time; Dice loss of a part"
        found.append(Remedy({"train.microbatches": divided[0]}, price))
    if len(together) > 1:
        found.append(Remedy(together, "all of that"))
    if half := batch // 2 // (shards * parts) * shards * parts:
        found.append(Remedy({"train.batch_size": half}, "another recipe"))

    def runs(remedy: Remedy) -> bool:
        try:
            applied = remedy.applied(config)
            mesh_of(applied.mesh, applied.model, applied.train.batch_size)
        except UserError:
            return False
        return True

    return list(filter(runs, found))


def step_bytes(config: ConfigDict, classes: int, resident: int = 0) -> int:
    """Returns the bytes that a train step needs on a device, with those of resident slices.

    The TPU compiler refuses a step that does not fit; its error states the size.
    """
    try:
        compiled = aot.compile_step(
            config.model,
            TrainingPlan.from_config(config),
            classes,
            device_mesh.make_mesh(**config.mesh),
        )
    except jax.errors.JaxRuntimeError as error:
        if (used := re.search(r"Used ([\d.]+)([KMGT]?) of", str(error))) is None:
            raise
        return math.ceil(float(used[1]) * 2 ** _UNITS[used[2]]) + resident
    return aot.compiled_cost(compiled).total + resident


def memory_limit(device) -> int | None:
    """Returns the bytes of a device that JAX may use, else those of its data sheet, else None.

    JAX knows no limit for CPUs.
    """
    stats, chip = device.memory_stats() or {}, accelerators.find_chip(device.device_kind)
    return stats.get("bytes_limit") or (chip and int(chip.memory_bytes))


def format_bytes(size: float) -> str:
    """Formats bytes as GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _resident_bytes(image_size: int, resident_gib: float, workdir) -> int:
    """Bytes of a device-resident few-shot set; 0 if it is not resident or there is no list yet."""
    try:
        count = len(dataset.stored_list(workdir))
    except UserError:
        return 0
    size = count * image_size**2 * _BYTES_PER_PIXEL
    return size if size <= resident_gib * 2**30 else 0


def _reason(error: Exception) -> str:
    """First line of an error, without its code."""
    return str(error).splitlines()[0].removeprefix(f"{_EXHAUSTED}: ").strip().rstrip(".")


def _was_segmenting(error: Exception) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = (frame.f_globals.get("__name__", "") for frame in frames)
    return any(name.startswith(("pgpsam_jax.evaluation", "pgpsam_jax.inference")) for name in names)
