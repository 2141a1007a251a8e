"""Which process of how many this is: by flags, or by what the scheduler says."""

import os
from typing import NamedTuple

from pgpsam_jax.errors import UserError

START_SECONDS = 300  # for all processes to be there


class Place(NamedTuple):
    """Where a process stands. local_devices: its accelerators by number, None for all it sees."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    local_devices: list[int] | None = None


def from_flags(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """The place that the three flags name; None where none is given or there is one process."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(
            "--coordinator HOST:PORT, --processes N and --process I go together; give "
            + " and ".join(missing)
        )
    if not 0 <= process < processes:
        raise UserError(
            f"--process {process} of --processes {processes} does not exist; number them from 0 to "
            "--processes - 1"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator {coordinator!r} is not HOST:PORT; name the machine of process 0 and a "
            "free port there, such as node1:5123"
        )
    return Place(coordinator, processes, process) if processes > 1 else None


def from_scheduler() -> Place | None:
    """The place that SLURM, Open MPI, Cloud TPU or Kubernetes gives; None for one process.

    JAX knows how to ask them. It is not asked where it would find more processes than there are:
    in a SLURM allocation that runs one task, or a Kubernetes pod of no indexed job.
    """
    from jax._src import clusters  # where `jax.distributed.initialize` looks

    ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 0))
    steps = os.environ.get("SLURM_STEP_NUM_TASKS")
    if ranks == 1 or (not ranks and steps == "1"):
        return None
    for cluster in clusters.ClusterEnv._cluster_types:
        pods = cluster is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ
        if (ranks and cluster is not clusters.OmpiCluster) or cluster.opt_in_only_method or pods:
            continue
        try:
            if not cluster.is_env_present():
                continue
            count = cluster.get_process_count()
            if count == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(START_SECONDS, port)
            return Place(address, count, cluster.get_process_id(), _own_devices(cluster))
        except Exception as error:  # of a metadata server, a DNS, a variable that is not a number
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"{cluster.__name__} is there but does not say which of how many processes this is "
                f"({reason}); give --coordinator, --processes and --process, or --distributed=off "
                "for one process"
            ) from None
    if ranks:
        raise UserError(
            f"mpirun runs {ranks} processes but does not say where the first is; give "
            "--coordinator HOST:PORT --processes $OMPI_COMM_WORLD_SIZE --process "
            "$OMPI_COMM_WORLD_RANK, or --distributed=off for processes of their own"
        )
    return None


def _own_devices(cluster) -> list[int] | None:
    """JAX's rule for GPUs, the task's number on its machine, where tasks see each other's.

    Not for a task alone on its machine, nor for one that sees a single GPU, which is number 0.
    """
    number = cluster.get_local_process_id()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # by machine, such as 2(x3),1
    tasks = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", tasks)
    alone = all(part.split("(")[0] == "1" for part in tasks.split(","))
    return None if number is None or alone or (visible and "," not in visible) else [number]
