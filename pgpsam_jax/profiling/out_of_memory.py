"""Suggestions for out-of-memory errors: what the train step needs, and which settings need less.

All numbers are the compiler's plan for one device (`aot.CompiledCost.total`) of the actual step:
each setting is compiled for the current mesh, without weights on a device. A step of SAM's size
takes most of a minute to compile, so the cheapest remedies come first, and the search ends once
enough of them fit or its time is up.
"""

import contextlib
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

SECONDS = 240  # after which no other setting is compiled
ENOUGH = 3  # settings that fit are as many as anybody reads
_EXHAUSTED = "RESOURCE_EXHAUSTED"
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_BYTES_PER_PIXEL = 3  # of the few-shot set: float16 grey value, uint8 label


class Remedy(NamedTuple):
    """Settings that may need less memory (field -> value), and what one gives for it."""

    settings: dict
    price: str

    @property
    def flags(self) -> str:
        """As they are written on the command line."""
        return " ".join(f"--config.{field}={value}" for field, value in self.settings.items())

    def applied(self, config: ConfigDict) -> ConfigDict:
        """A copy of the configuration with the settings."""
        config = config.copy_and_resolve_references()
        config.update_from_flattened_dict(self.settings)
        return config


@contextlib.contextmanager
def oom_to_user_error(config: ConfigDict | None, workdir):
    """A device that runs out of memory inside is a `UserError` that says what would help.

    config: the run's; None for the one that the workdir holds.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _EXHAUSTED not in str(error):
            raise
        reason, segmenting = _reason(error), _was_segmenting(error)
        # Arrays of the run live on in the frames it went through, and compiling needs room too.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        config = serialization.load_config(workdir) if config is None else config
        raise UserError(advice(config, workdir, reason, segmenting)) from None


def advice(config: ConfigDict, workdir, reason: str, segmenting: bool = False) -> str:
    """One sentence on what went wrong and, line by line, what would help.

    segmenting: it happened in validation or evaluation, not in a training step.
    """
    if segmenting:
        size = config.eval.batch_size
        smaller = f"choose --config.eval.batch_size={size // 2} or less, it is {size}"
        tell = smaller if size > 1 else "no smaller batch is left: use a device with more memory"
        return f"a device ran out of memory while volumes were segmented ({reason}); {tell}"
    head = f"a device ran out of memory ({reason})"
    remedies = list_remedies(config)
    if multihost.is_multiprocess():  # compiling is work of all processes, and the others are stuck
        listed = "\n".join(f"  {remedy.flags}  ({remedy.price})" for remedy in remedies)
        return f"{head}; settings that need less, cheapest first:\n{listed}"
    minutes = SECONDS // 60
    multihost.print_once(f"{head}: looking for settings that fit, for {minutes} minutes at most")
    resident = _resident_bytes(config.model.image_size, config.data.resident_gib, workdir)
    classes = dataset.label_table(locations.resolve_paths(config, workdir).data).num_classes

    def measure(setting: ConfigDict) -> int:
        return step_bytes(setting, classes) + resident

    device = jax.local_devices()[0]
    needs, limit = measure(config), memory_limit(device)
    found = measure_remedies([(r, r.applied(config)) for r in remedies], needs, limit, measure)
    return _listed(head, needs, limit, device.device_kind, found)


def _listed(head: str, needs: int, limit, kind: str, remedies) -> str:
    """The sentence and the list, from bytes needed and those of the device (None: unknown)."""
    room = f", and {kind} offers {format_bytes(limit)}" if limit else ""
    text = f"{head}: a training step needs {format_bytes(needs)} on each device{room}"
    if limit and needs < limit:
        text += (
            ", which should fit: see whether another program uses the device, or give JAX more of "
            "it with XLA_CLIENT_MEM_FRACTION=0.95"
        )
    lines = []
    for remedy, size in remedies:
        verdict = "not compiled for want of time" if size is None else format_bytes(size)
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
    """Each remedy that needs less than `needs`, with its bytes; None where time ran out before."""
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
    """What needs less memory, by what it costs the user, and last all that leaves the recipe."""
    batch, parts, mesh = (
        config.train.batch_size,
        config.train.microbatches,
        device_mesh.make_mesh(**config.mesh),
    )
    lanes = mesh.shape["data"] * mesh.shape["fsdp"]
    found, together = [], {}
    if config.model.remat != "blocks":
        together["model.remat"] = "blocks"
        found.append(Remedy({"model.remat": "blocks"}, "the same results, a slower step"))
    if lanes > mesh.shape["fsdp"]:
        spread = {"mesh.data": 1, "mesh.fsdp": lanes}
        found.append(Remedy(spread, "the same results, weights in parts over the devices"))
    if config.model.compute_dtype != "bfloat16":
        together["model.compute_dtype"] = "bfloat16"
        found.append(Remedy({"model.compute_dtype": "bfloat16"}, "faster on GPU and TPU, rounded"))
    divided = [n for n in range(2 * parts, batch + 1, parts) if batch % (n * lanes) == 0]
    if divided:
        together["train.microbatches"] = divided[-1]
        price = "the same batch in parts, more time; Dice loss of a part"
        found.append(Remedy({"train.microbatches": divided[0]}, price))
    if len(together) > 1:
        found.append(Remedy(together, "all of that"))
    if half := batch // 2 // (lanes * parts) * lanes * parts:
        found.append(Remedy({"train.batch_size": half}, "another recipe"))

    def runs(remedy: Remedy) -> bool:
        try:
            applied = remedy.applied(config)
            mesh_of(applied.mesh, applied.model, applied.train.batch_size)
        except UserError:
            return False
        return True

    return list(filter(runs, found))


def step_bytes(config: ConfigDict, classes: int) -> int:
    """Bytes a training step needs at once on a device; the few-shot set, if it stays there, apart.

    A TPU's compiler refuses a step that does not fit, and says what it would need.
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
        return math.ceil(float(used[1]) * 2 ** _UNITS[used[2]])
    return aot.compiled_cost(compiled).total


def memory_limit(device) -> int | None:
    """Bytes of a device that JAX may use; those of its data sheet, or None where neither is known.

    The memory of a CPU is that of the machine: JAX knows no limit.
    """
    stats, chip = device.memory_stats() or {}, accelerators.find_chip(device.device_kind)
    return stats.get("bytes_limit") or (chip and int(chip.memory_bytes))


def format_bytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _resident_bytes(image_size: int, resident_gib: float, workdir) -> int:
    """Of the few-shot set, where it stays on every device; 0 before the run has a list."""
    try:
        count = len(dataset.stored_list(workdir))
    except UserError:
        return 0
    size = count * image_size**2 * _BYTES_PER_PIXEL
    return size if size <= resident_gib * 2**30 else 0


def _reason(error: Exception) -> str:
    """The first line of an error without its code."""
    return str(error).splitlines()[0].removeprefix(f"{_EXHAUSTED}: ").strip().rstrip(".")


def _was_segmenting(error: Exception) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = (frame.f_globals.get("__name__", "") for frame in frames)
    return any(name.startswith(("pgpsam_jax.evaluation", "pgpsam_jax.inference")) for name in names)
