"""Checkpoints of a run: what trains, its optimiser state and the data order; never the base.

Orbax writes each into a temporary folder and renames it, in the background. A checkpoint has
three parts: `params`, `progress` (optimiser state, step, seed) and `data` (grain's position), so
that prediction reads `params` alone. All processes of a run write it together; another number of
them, or another mesh, can go on from it. Parameters that validation chose have a folder of their
own. Frozen weights live beside them once: by path and SHA-256 of the converted SAM, or, for a
random backbone, as `frozen.safetensors` in the workdir.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from pgpsam_jax import distributed
from pgpsam_jax.errors import UserError
from pgpsam_jax.files import atomic_path, write_json
from pgpsam_jax.parameters import flat_paths
from pgpsam_jax.step import TrainState
from pgpsam_jax.weights import read_safetensors

KEEP = 2
FROZEN = "frozen.safetensors"
BEST = "best"


class _Folder:
    """Numbered checkpoints in a folder, of which the newest `keep` stay."""

    def __init__(self, folder, keep: int):
        from orbax.checkpoint import v1 as ocp

        self.folder = Path(folder).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Number of the newest complete checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def restore_params(self, abstract_params):
        """Only the trained parameters of the newest checkpoint."""
        return self._load({"params": abstract_params})["params"]

    def _load(self, abstract: dict) -> dict:
        if self.latest is None:
            raise UserError(
                f"{self.folder} holds no complete checkpoint; train first with "
                "python -m pgpsam_jax.main --config CONFIG --workdir WORKDIR"
            )
        try:
            return self._checkpointer.load_checkpointables(self.latest, abstract)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"checkpoint {self.folder / str(self.latest)} cannot be read ({reason}); "
                "delete that folder to go on without it"
            ) from None

    def close(self) -> None:
        """Wait for a save under way, and release the folder."""
        self._checkpointer.close()


class Checkpoints(_Folder):
    """The `checkpoints` folder of a workdir, numbered by step."""

    def __init__(self, workdir):
        super().__init__(Path(workdir) / "checkpoints", KEEP)

    def save(self, state: TrainState, iterator) -> None:
        """Save in the background; the state may be donated right after the call."""
        parts = {
            "params": state.params,
            "progress": _progress(state),
            "data": _Position(iterator),
        }
        self._checkpointer.save_checkpointables_async(int(state.step), parts)

    def restore(self, abstract: TrainState, iterator) -> TrainState:
        """The newest state, placed as `abstract` (with shardings) says; moves the iterator."""
        parts = self._load(
            {
                "params": abstract.params,
                "progress": _progress(abstract),
                "data": _Position(iterator),
            }
        )
        return TrainState(params=parts["params"], **parts["progress"])


class _Position:
    """Orbax's way to a loader's position, which all processes share: the first one writes it."""

    def __init__(self, iterator):
        self._iterator = iterator

    async def save(self, directory):
        state = json.dumps(self._iterator.get_state())

        async def write():
            folder = await directory.await_creation()
            if distributed.is_first():
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


class Best(_Folder):
    """The `best` folder of a workdir: the parameters that did best on the validation cases.

    Numbered by improvement, not by step: a run that goes on from an older checkpoint may find a
    better state at an earlier step than that of the last one kept.
    """

    def __init__(self, workdir):
        super().__init__(Path(workdir) / BEST, 1)

    @property
    def record(self) -> dict | None:
        """What was saved with them: their `step` and `score`."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.metrics

    def save(self, params, step: int, score: float) -> None:
        """Replace the parameters; they and the record appear together or not at all."""
        number = 0 if self.latest is None else self.latest + 1
        record = {"step": step, "score": score}
        self._checkpointer.save_checkpointables(number, {"params": params}, metrics=record)


def best_record(workdir) -> dict | None:
    """The record of the `best` folder; None where validation has chosen nothing."""
    if not (Path(workdir) / BEST).is_dir():
        return None
    best = Best(workdir)
    record = best.record
    best.close()
    return record


def restore_params(workdir, abstract_params, *, best: bool):
    """The trained parameters of a workdir: the newest, or with `best` those validation chose.

    Where it has chosen none yet, they are the newest too. Of a model that does not train, none.
    """
    if not jax.tree.leaves(abstract_params):
        return abstract_params
    folder = (Best if best and best_record(workdir) else Checkpoints)(workdir)
    params = folder.restore_params(abstract_params)
    folder.close()
    return params


def _progress(state: TrainState) -> dict:
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


def frozen_origin(workdir) -> str | None:
    """Where a workdir's frozen weights come from: the path of a converted SAM, the name of a
    converted checkpoint, "" for a random backbone; None where nothing is settled yet."""
    record = Path(workdir) / "base.json"
    return json.loads(record.read_text(encoding="utf-8"))["base"] if record.is_file() else None


def holds_backbone(workdir) -> bool:
    """Whether all frozen weights of a workdir are in it, so that it needs no converted SAM."""
    record = Path(workdir) / "base.json"
    return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["sha256"] is None


def settle_base(workdir, base: str, digest: str | None, frozen, drawn=None) -> None:
    """Pin the frozen weights of a workdir at its first use, and hold later uses to them.

    A converted SAM (`digest` given) is pinned by path and SHA-256. A random backbone is written
    into the workdir once and read back afterwards, so that the run does not hang on a seed. So are,
    with a converted SAM, the frozen leaves that it does not give: `drawn`, by path.
    """
    with distributed.first_before_others("base"):  # the others read what it wrote
        kept = flat_paths(frozen) if digest is None else drawn or {}
        _settle_base(Path(workdir) / "base.json", Path(workdir) / FROZEN, base, digest, kept)


def _settle_base(record: Path, file: Path, base: str, digest: str | None, kept: dict) -> None:
    if not record.is_file():
        if kept:
            arrays = {name: np.asarray(leaf[...]) for name, leaf in kept.items()}
            with atomic_path(file) as temporary:
                save_file(arrays, temporary)
        write_json(record, {"base": base, "sha256": digest})
        return
    pinned = json.loads(record.read_text(encoding="utf-8"))["sha256"]
    if pinned != digest:
        raise UserError(
            f"{record.parent} was trained on SAM weights with SHA-256 {pinned}, but model.base "
            f"({base or 'empty'}) has {digest}; give the weights of that run"
        )
    if kept:
        _load_frozen(file, kept)


def _load_frozen(path: Path, leaves: dict) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; restore it from a copy or train again")
    arrays = read_safetensors(path)
    if {k: v.shape for k, v in arrays.items()} != {k: v.shape for k, v in leaves.items()}:
        raise UserError(f"{path} does not fit this workdir's model; restore it or train again")
    for name, leaf in leaves.items():
        leaf.set_value(jnp.asarray(arrays[name]))
