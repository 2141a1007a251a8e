"""Processes of one run on this machine, without a model: what they do together, and how they end.

python processes.py HOST:PORT COUNT PROCESS SCENARIO [FOLDER]: a function below, in a session.
"""

import contextlib
import json
import os
import random
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pgpsam_jax.distributed import cluster_env, initialize, multihost
from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.runtime import preemption
from pgpsam_jax.sharding import device_mesh

multihost.SHARED_SECONDS = 1  # short, to keep the tests fast
LIMITS = {"start_seconds": 8, "heartbeat_seconds": int(os.environ.get("HEARTBEAT_SECONDS", 4))}


def together(folder):
    """All that processes do together; each prints what it got."""
    mesh = device_mesh.make_mesh(data=2, tensor=jax.device_count() // 2)
    numbers = {"a": np.arange(24.0).reshape(4, 6), "b": np.float32(7)}
    spread = {"a": NamedSharding(mesh, PartitionSpec("data", "tensor"))}
    spread["b"] = device_mesh.replicated(mesh)
    tree = multihost.put_global(numbers, spread)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))(tree)
    multihost.check_shared(folder)
    with multihost.first_before_others("turn"):
        turn = len(list(folder.iterdir()))
        (folder / str(jax.process_index())).touch()
    multihost.agree({"a number": 3, "some": {"numbers": [1, 2]}})
    found = {
        "gathered_arrays": jax.tree.map(
            lambda x: np.asarray(x).tolist(), multihost.all_gather(doubled)
        ),
        "gathered": multihost.gather("x" * jax.process_index()),
        "shard": multihost.shard_for_process(range(5)),
        "turn": turn,
        "spread": not tree["a"].is_fully_addressable,
    }
    print(json.dumps(found), flush=True)


def mistake(folder):
    """Process 0 finds one; the other waits for it."""
    if jax.process_index() == 0:
        raise UserError("there is no such volume")
    multihost.barrier("never")


def fault(folder):
    """An error nobody foresaw, in process 1."""
    if jax.process_index() == 1:
        raise ZeroDivisionError("a fault")
    multihost.barrier("never")


def differ(folder):
    multihost.agree({"config": {"train": {"batch_size": 8 * (1 + jax.process_index())}}})
    multihost.barrier("never")


def apart(folder):
    """Each has a folder of its own."""
    multihost.check_shared(folder / str(jax.process_index()))


def work(folder):
    """For ever, without anything that all do together."""
    jax.devices()
    print("working", flush=True)
    while True:
        time.sleep(0.1)


def wait(folder):
    """For one of them to be stopped by a signal, where nothing is to be saved."""
    print("working", flush=True)
    multihost.barrier("never")


def crash(folder):
    """Process 1 is aborted by its own code, in the main thread."""
    if jax.process_index() == 1:
        os.abort()
    multihost.barrier("never")


def collect(folder):
    """For ever, sums over all devices."""
    total = jax.jit(
        lambda x: x.sum(), out_shardings=device_mesh.replicated(device_mesh.make_mesh())
    )
    lanes = device_mesh.batch_sharding(device_mesh.make_mesh())
    while True:
        jax.block_until_ready(total(multihost.put_global(np.ones(jax.device_count()), lanes)))
        print("working", flush=True)


def steps(folder):
    """Until a signal that reaches one of them, from step 1000, up to three steps apart."""
    draw = random.Random(jax.process_index())
    with preemption.defer_to_step(1000) as stop:
        for step in range(1001, 10**6):
            time.sleep(draw.choice([0, 0.001, 0.003]))
            if step % 3 == 0:
                multihost.barrier("step")
            if step == 1003:
                print("working", flush=True)
            if stop.should_stop(step):
                assert stop.should_stop(step)  # the training loop asks twice
                (folder / f"saved{jax.process_index()}").write_text(str(step))
                if step % 3:
                    multihost.barrier("step")
                stop.interrupt(step, agreed=True)


if __name__ == "__main__":
    from pathlib import Path

    coordinator, count, process, scenario, *folder = sys.argv[1:]
    signals = scenario in ("steps", "wait")
    handling = preemption.handle_signals if signals else contextlib.nullcontext
    with exit_on_user_error(), handling():
        info = cluster_env.from_flags(coordinator, int(count), int(process))
        with initialize.joined(info, "runs/workdir", **LIMITS):
            globals()[scenario](Path(*folder))
