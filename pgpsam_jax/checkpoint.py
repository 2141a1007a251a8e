"""Checkpoints of a run: what trains, its optimiser state and the data order; never the base.

Orbax writes each into a temporary folder and renames it, in the background. A checkpoint has
three parts: `params`, `progress` (optimiser state, step, seed) and `data` (grain's position), so
that prediction reads `params` alone. Frozen weights live beside them once: by path and SHA-256
of the converted SAM, or, for a random backbone, as `frozen.safetensors` in the workdir.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from pgpsam_jax.errors import UserError
from pgpsam_jax.files import atomic_path, write_json
from pgpsam_jax.parameters import flat_paths
from pgpsam_jax.step import TrainState
from pgpsam_jax.weights import read_safetensors

KEEP = 2


class Checkpoints:
    """The `checkpoints` folder of a workdir."""

    def __init__(self, workdir):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState, iterator) -> None:
        """Save in the background; the state may be donated right after the call."""
        parts = {
            "params": state.params,
            "progress": _progress(state),
            "data": iterator,
        }
        self._checkpointer.save_checkpointables_async(int(state.step), parts)

    def restore(self, abstract: TrainState, iterator) -> TrainState:
        """The newest state, placed as `abstract` (with shardings) says; moves the iterator."""
        parts = self._load(
            {
                "params": abstract.params,
                "progress": _progress(abstract),
                "data": iterator,
            }
        )
        return TrainState(params=parts["params"], **parts["progress"])

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
                "delete that folder to go on from the one before"
            ) from None

    def close(self) -> None:
        """Wait for a save under way, and release the folder."""
        self._checkpointer.close()


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


def settle_base(workdir, base: str, digest: str | None, frozen) -> None:
    """Pin the frozen weights of a workdir at its first use, and hold later uses to them.

    A converted SAM (`digest` given) is pinned by path and SHA-256. A random backbone is written
    into the workdir once and read back afterwards, so that the run does not hang on a seed.
    """
    record, file = Path(workdir) / "base.json", Path(workdir) / "frozen.safetensors"
    if not record.is_file():
        if digest is None:
            arrays = {name: np.asarray(leaf[...]) for name, leaf in flat_paths(frozen).items()}
            with atomic_path(file) as temporary:
                save_file(arrays, temporary)
        write_json(record, {"base": base, "sha256": digest})
        return
    pinned = json.loads(record.read_text(encoding="utf-8"))["sha256"]
    if pinned != digest:
        raise UserError(
            f"{workdir} was trained on SAM weights with SHA-256 {pinned}, but model.base "
            f"({base or 'empty'}) has {digest}; give the weights of that run"
        )
    if digest is None:
        _load_frozen(file, frozen)


def _load_frozen(path: Path, frozen) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; restore it from a copy or train again")
    arrays, leaves = read_safetensors(path), flat_paths(frozen)
    if {k: v.shape for k, v in arrays.items()} != {k: v.shape for k, v in leaves.items()}:
        raise UserError(f"{path} does not fit this workdir's model; restore it or train again")
    for name, leaf in leaves.items():
        leaf.set_value(jnp.asarray(arrays[name]))
