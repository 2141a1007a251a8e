"""Checkpoints: trainable parameters, optimizer state and data position; never the frozen backbone.

Orbax writes each checkpoint to a temporary folder in the background and renames it; the SHA-256 of
each file is then stored and checked on every read. A checkpoint has three parts: `params`,
`progress` (optimizer state, step, seed) and `data` (grain's position), so prediction reads only
`params`. All processes of a run write it together; a run may resume with a different number of
processes or another mesh. The best parameters have a separate folder (`best_parameters`), and the
frozen weights are stored once per workdir (`frozen_weights`).
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from logging import ERROR
from pathlib import Path
from typing import Any, Self

import jax
from absl import logging

from pgpsam_jax.checkpointing import checksums
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import Interrupted, UserError, as_user_error, first_line
from pgpsam_jax.utils.files import StrPath
from pgpsam_jax.utils.untrusted_text import sanitize

KEEP = 2
CHECKPOINTS = "checkpoints"
BEST = "best"

# Orbax logs the errors that it also raises, with pages of traceback.
logging.get_absl_logger().addFilter(
    lambda record: record.levelno < ERROR or "orbax" not in record.pathname
)


class _Folder:
    """Numbered checkpoints in a folder; keeps the newest `keep`.

    reading: never writes, since another process may be training in the folder.
    """

    def __init__(self, folder: StrPath, keep: int, *, reading: bool = False) -> None:
        from orbax.checkpoint import v1 as ocp

        self.folder, self._reading = Path(folder).absolute(), reading
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._checkpointer: Any = None  # Orbax's, which has no types; None for a missing folder
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
            if (converted := self._as_user_error(error)) is not error:
                raise converted from error
            raise UserError(
                f"a checkpoint in {self.folder} is damaged ({_reason(error)}); delete its folder "
                "to continue without it"
            ) from None

    @property
    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, or None."""
        newest = self._newest
        return None if newest is None else newest.step

    @property
    def _newest(self) -> Any:
        return None if self._checkpointer is None else self._checkpointer.latest

    def restore_params(self, abstract_params: Any) -> Any:
        """Returns only the trainable parameters of the newest checkpoint."""
        return self._load({"params": abstract_params})["params"]

    def _load(self, abstract: dict[str, Any]) -> dict[str, Any]:
        number = self.latest
        if number is None:
            raise UserError(
                f"{self.folder} holds no complete checkpoint; train first with "
                "pgpsam train --config CONFIG --workdir WORKDIR"
            )
        folder = self.folder / str(number)
        try:
            checksums.check(folder, abstract)
            return self._checkpointer.load_checkpointables(number, abstract)
        except jax.errors.JaxRuntimeError:  # a device error
            raise
        except Exception as error:  # damage raises a dozen types
            if self._reading and (max(_numbers(self.folder), default=number) > number):
                raise UserError(
                    f"{folder} was replaced by a newer checkpoint; start again"
                ) from None
            if other := self._other_parameters(number, abstract["params"]):
                raise UserError(
                    f"checkpoint {folder} is of another version of this model "
                    f"({sanitize(other[0])} and {len(other) - 1} more "
                    "parameters are in one of them only); read it with "
                    "the version that wrote it (provenance.json), or train again in another workdir"
                ) from None
            before = [c.step for c in self._checkpointer.checkpoints if c.step != number]
            without = f"resume from {before[-1]}" if before else "continue without it"
            raise UserError(
                f"checkpoint {folder} cannot be read ({_reason(error)}); delete that folder to "
                f"{without}"
            ) from None

    def _other_parameters(self, number: int, abstract: Any) -> list[str]:
        """Paths of parameters that only the checkpoint or only the model has."""
        try:
            stored = self._checkpointer.checkpointables_metadata(number).metadata["params"]
        except Exception:  # damaged
            return []
        theirs, ours = _paths(stored), _paths(abstract)
        # A checkpoint that has nothing in common with the model is damaged, not of another version.
        return sorted(theirs ^ ours) if theirs & ours else []

    def _save(self, number: int, parts: dict[str, Any], **options: Any) -> None:
        """Starts a background save; the arrays may be changed right after the call."""
        self.wait_for_save()
        try:
            response = self._checkpointer.save_checkpointables_async(number, parts, **options)
        except Exception as error:
            raise self._as_user_error(error) from error
        folder = self.folder / str(number)
        self._pending = self._thread.submit(_finish_save, response, folder)

    def wait_for_save(self) -> None:
        """Waits for a pending save and raises its error."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            raise self._as_user_error(error) from error

    def _as_user_error(self, error: Exception) -> Exception:
        """Replaces Orbax's error for a full or read-only disk."""
        converted = as_user_error(error)
        if converted is error:
            return error
        return UserError(f"no checkpoint can be written to {self.folder}: {converted}")

    def close(self) -> None:
        """Waits for a pending save and releases the folder."""
        self._thread.shutdown()
        try:
            self.wait_for_save()
        finally:
            if self._checkpointer is not None:
                with contextlib.suppress(OSError, ValueError, RuntimeError):  # reported already
                    self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A pending save would wait for processes that have died.
        if (
            error is None
            or not multihost.is_multiprocess()
            or isinstance(error, UserError | Interrupted)
        ):
            self.close()


def _paths(tree: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return {name.removesuffix("/value") for name in names}


def _finish_save(response: Any, folder: Path) -> None:
    """Waits until a checkpoint is complete, then adds its checksums."""
    response.result()
    if multihost.is_first():
        checksums.write(folder)


def _reason(error: BaseException) -> str:
    """First line of an error's root cause; Orbax's own messages are long and say little."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:200]


class Checkpoints(_Folder):
    """The `checkpoints` folder of a workdir, numbered by step."""

    def __init__(self, workdir: StrPath, *, reading: bool = False) -> None:
        super().__init__(Path(workdir) / CHECKPOINTS, KEEP, reading=reading)

    def save(self, state: Any, iterator: Any) -> None:
        """Saves in the background; the state may be donated right after the call."""
        self._save(int(state.step), _parts(state, iterator))

    def restore(self, abstract: Any, iterator: Any) -> Any:
        """Restores the newest state with the shardings of `abstract`; moves the iterator."""
        parts = self._load(_parts(abstract, iterator))
        return dataclasses.replace(abstract, params=parts["params"], **parts["progress"])


class _Position:
    """Orbax handler of the loader's position, which all processes share: the first writes it."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator

    async def save(self, directory: Any) -> Coroutine[Any, Any, None]:
        state = json.dumps(self._iterator.get_state())

        async def write() -> None:
            folder = await directory.await_creation()
            if multihost.is_first():
                (folder / "position.json").write_text(state)

        return write()

    async def load(self, directory: Any) -> Coroutine[Any, Any, None]:
        async def read() -> None:
            # Older checkpoints hold one identical file per process, written by grain.
            files = sorted(directory.glob("*.json"))
            if not files:
                raise FileNotFoundError(f"{directory} holds no position")
            self._iterator.set_state(json.loads(files[0].read_text()))

        return read()


def saved_steps(workdir: StrPath) -> list[int]:
    """Returns the steps of all checkpoints in a workdir, damaged ones too, in ascending order."""
    return _numbers(Path(workdir) / CHECKPOINTS)


def _numbers(folder: Path) -> list[int]:
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _parts(state: Any, iterator: Any) -> dict[str, Any]:
    """The parts of a checkpoint; prediction reads only the parameters."""
    progress = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {"params": progress.pop("params"), "progress": progress, "data": _Position(iterator)}


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Returns a tree of `ShapeDtypeStruct` with shardings, for `restore`."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
