"""Checkpoints of a run: what trains, its optimiser state and the data order; never the base.

Orbax writes each into a temporary folder and renames it, in the background; then the SHA-256 of
every file is put beside them, and compared when it is read. A checkpoint has three parts: `params`,
`progress` (optimiser state, step, seed) and `data` (grain's position), so that prediction reads
`params` alone. All processes of a run write it together; another number of them, or another mesh,
can go on from it. Parameters that validation chose have a folder of their own. Frozen weights live
beside them once: see `backbone`.
"""

import contextlib
import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from logging import ERROR
from pathlib import Path

import jax
from absl import logging

from pgpsam_jax.checkpointing import checksums
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import Interrupted, UserError, explained
from pgpsam_jax.utils.untrusted_text import shown

KEEP = 2
CHECKPOINTS = "checkpoints"
BEST = "best"

# Orbax logs, with pages of traceback, the errors that it raises as well.
logging.get_absl_logger().addFilter(
    lambda record: record.levelno < ERROR or "orbax" not in record.pathname
)


class _Folder:
    """Numbered checkpoints in a folder, of which the newest `keep` stay.

    reading: nothing is written, removed or made, as another process may be training there.
    """

    def __init__(self, folder, keep: int, *, reading: bool = False):
        from orbax.checkpoint import v1 as ocp

        self.folder, self._reading = Path(folder).absolute(), reading
        self._sealing, self._thread = None, ThreadPoolExecutor(1)
        self._checkpointer = None
        if reading and not self.folder.is_dir():
            return
        policies = ocp.training.save_decision_policies, ocp.training.preservation_policies
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                save_decision_policy=policies[0].FixedIntervalPolicy(1),
                preservation_policy=policies[1].LatestN(keep),
                cleanup_tmp_directories=not reading,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if (told := self._told(error)) is not error:
                raise told from error
            raise UserError(
                f"a checkpoint in {self.folder} is damaged ({_reason(error)}); delete its folder "
                "to go on without it"
            ) from None

    @property
    def latest(self) -> int | None:
        """Number of the newest complete checkpoint."""
        newest = self._newest
        return None if newest is None else newest.step

    @property
    def _newest(self):
        return None if self._checkpointer is None else self._checkpointer.latest

    def restore_params(self, abstract_params):
        """Only the trained parameters of the newest checkpoint."""
        return self._load({"params": abstract_params})["params"]

    def _load(self, abstract: dict) -> dict:
        number = self.latest
        if number is None:
            raise UserError(
                f"{self.folder} holds no complete checkpoint; train first with "
                "python -m pgpsam_jax.main --config CONFIG --workdir WORKDIR"
            )
        folder = self.folder / str(number)
        try:
            checksums.check(folder, abstract)
            return self._checkpointer.load_checkpointables(number, abstract)
        except jax.errors.JaxRuntimeError:  # of the devices
            raise
        except Exception as error:  # damage shows in a dozen types
            if self._reading and (max(_numbers(self.folder), default=number) > number):
                raise UserError(f"{folder} has given way to a newer one; start again") from None
            if other := self._other_parameters(number, abstract["params"]):
                raise UserError(
                    f"checkpoint {folder} is of another version of this model ({shown(other[0])} "
                    f"and {len(other) - 1} more parameters are in one of them only); read it with "
                    "the version that wrote it (provenance.json), or train again in another workdir"
                ) from None
            before = [c.step for c in self._checkpointer.checkpoints if c.step != number]
            without = f"go on from {before[-1]}" if before else "go on without it"
            raise UserError(
                f"checkpoint {folder} cannot be read ({_reason(error)}); delete that folder to "
                f"{without}"
            ) from None

    def _other_parameters(self, number: int, abstract) -> list[str]:
        """Paths that are either in the checkpoint or in the model, not in both."""
        try:
            stored = self._checkpointer.checkpointables_metadata(number).metadata["params"]
        except Exception:  # it is damaged
            return []
        return sorted(_paths(stored) ^ _paths(abstract))

    def _save(self, number: int, parts: dict, **options) -> None:
        """Begin to save; what is saved may be changed right after the call."""
        self._settle()
        try:
            response = self._checkpointer.save_checkpointables_async(number, parts, **options)
        except Exception as error:
            raise self._told(error) from error
        self._sealing = self._thread.submit(_seal, response, self.folder / str(number))

    def _settle(self) -> None:
        """Wait for a save under way."""
        sealing, self._sealing = self._sealing, None
        try:
            if sealing is not None:
                sealing.result()
        except Exception as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        """The sentence for a disk that is full, or cannot be written, in place of Orbax's error."""
        told = explained(error)
        if told is error:
            return error
        return UserError(f"no checkpoint can be written to {self.folder}: {told}")

    def close(self) -> None:
        """Wait for a save under way, and release the folder."""
        self._thread.shutdown()
        try:
            self._settle()
        finally:
            if self._checkpointer is not None:
                with contextlib.suppress(OSError, ValueError, RuntimeError):  # said already
                    self._checkpointer.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Where processes are gone, a save under way would wait for them.
        if (
            error is None
            or not multihost.is_multiprocess()
            or isinstance(error, UserError | Interrupted)
        ):
            self.close()


def _paths(tree) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return {name.removesuffix("/value") for name in names}


def _seal(response, folder: Path) -> None:
    """Wait until a checkpoint is complete, and write the hashes of its files into it."""
    response.result()
    if multihost.is_first():
        checksums.write(folder)


def _reason(error: BaseException) -> str:
    """The first line of what an error came from; Orbax's own say little, at length."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Checkpoints(_Folder):
    """The `checkpoints` folder of a workdir, numbered by step."""

    def __init__(self, workdir, *, reading: bool = False):
        super().__init__(Path(workdir) / CHECKPOINTS, KEEP, reading=reading)

    def save(self, state, iterator) -> None:
        """Save in the background; the state may be donated right after the call."""
        parts = {
            "params": state.params,
            "progress": _progress(state),
            "data": _Position(iterator),
        }
        self._save(int(state.step), parts)

    def restore(self, abstract, iterator):
        """The newest state, placed as `abstract` (with shardings) says; moves the iterator."""
        parts = self._load(
            {
                "params": abstract.params,
                "progress": _progress(abstract),
                "data": _Position(iterator),
            }
        )
        return dataclasses.replace(abstract, params=parts["params"], **parts["progress"])


class _Position:
    """Orbax's way to a loader's position, which all processes share: the first one writes it."""

    def __init__(self, iterator):
        self._iterator = iterator

    async def save(self, directory):
        state = json.dumps(self._iterator.get_state())

        async def write():
            folder = await directory.await_creation()
            if multihost.is_first():
                (folder / "position.json").write_text(state)

        return write()

    async def load(self, directory):
        async def read():
            # Grain wrote a file for each process, all of them alike, before there was this class.
            files = sorted(directory.glob("*.json"))
            if not files:
                raise FileNotFoundError(f"{directory} holds no position")
            self._iterator.set_state(json.loads(files[0].read_text()))

        return read()


def numbers(workdir) -> list[int]:
    """Of the checkpoints that a workdir holds, damaged ones too, from the oldest on."""
    return _numbers(Path(workdir) / CHECKPOINTS)


def _numbers(folder: Path) -> list[int]:
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _progress(state) -> dict:
    """Every field but the parameters, which prediction reads alone."""
    fields = dataclasses.fields(state)
    return {field.name: getattr(state, field.name) for field in fields if field.name != "params"}


def abstract_like(tree, shardings):
    """ShapeDtypeStructs with shardings, for `restore`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
