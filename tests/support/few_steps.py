"""A few training steps in a process of their own, and a hash of all that came out of them.

python few_steps.py [--of HOST:PORT,COUNT,PROCESS,FOLDER] [FIELD=VALUE ...]: settings of the model
as `remat='blocks'`, of other sections as `train__steps=3`; as one of several processes, whose last
state goes to a folder.
"""

import ast
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from pgpsam_jax.checkpointing import checkpoint
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.distributed import cluster_env, initialize
from pgpsam_jax.distributed.multihost import put_global
from pgpsam_jax.methods import build
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.device_batches import DeviceBatches
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.sharded_step import shard_step, sharding_of
from pgpsam_jax.training.train_loop import run_steps
from tests.support import tiny_method
from tests.support.small_run import config_for

SLICES, CLASSES, STEPS = 9, 3, 3


def trained(settings: dict, sizes: dict | None = None):
    """(graphdef, state after the last step, loader, metrics of every step), on a mesh."""
    named = {k if "__" in k else f"model__{k}": v for k, v in settings.items()}
    config = config_for(Path(), **named)
    rng, size = np.random.default_rng(0), config.model.image_size
    labels = rng.integers(0, CLASSES, (SLICES, 4, 4)).repeat(size // 4, 1).repeat(size // 4, 2)
    images = (labels / CLASSES + 0.1 * rng.random(labels.shape)).astype(np.float16)
    mesh = device_mesh.make_mesh(**sizes or {})
    loader = make_loader(SLICES, batch_size=config.train.batch_size, seed=0)
    feed = DeviceBatches({"image": images, "label": labels.astype(np.uint8)}, loader, mesh, np.inf)
    graphdef, params, frozen, _ = build.init_model(config.model, CLASSES, config.seed)
    batch = feed.abstract(config.train.batch_size)
    step = shard_step(
        TrainingPlan.from_config(config),
        mesh,
        graphdef,
        params,
        frozen,
        batch,
        epoch_size=SLICES,
        seed=0,
    )
    state = step.start(put_global(params, sharding_of(step.state.params)))
    said = []

    def note(number, metrics, *_):
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        said.append({"step": number} | values)

    frozen = put_global(frozen, sharding_of(step.frozen))
    state, *last = run_steps(step.lower().compile(), state, frozen, feed, 0, STEPS, note)
    note(STEPS, *last[-2:])
    return graphdef, state, loader, said


def main(settings: dict) -> list[str]:
    """SHA-256 of the state after the last step, and the metrics of every step, bit for bit."""
    _, state, _, said = trained(settings)
    lines = []
    for record in said:
        number = record.pop("step")
        lines.append(f"{number} {[(name, value.hex()) for name, value in sorted(record.items())]}")
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(state):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return [digest.hexdigest(), *lines]


def share(address: str, count: str, process: str, folder: str, settings: dict) -> None:
    """The same as one of several processes that have all weights in parts, saved in the end."""
    with initialize.joined(cluster_env.from_flags(address, int(count), int(process))):
        sizes = {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
        _, state, loader, said = trained(settings, sizes)
        with checkpoint.Checkpoints(Path(folder)) as checkpoints:
            checkpoints.save(state, loader)
        print("\n", *map(json.dumps, said), sep="\n", flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    joins = arguments[1].split(",") if arguments[:1] == ["--of"] else []
    pairs = (argument.split("=") for argument in arguments[2 if joins else 0 :])
    given = {name: ast.literal_eval(value) for name, value in pairs}
    with tiny_method.known(), tiny_method.spread():
        if joins:
            share(*joins, given)
        else:
            print("\n".join(main(given)))
