"""Process number and count, from flags or from the scheduler."""

import os
from typing import Any, NamedTuple

from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime import jax_internals

START_SECONDS = 300  # within which all processes must have joined


class ProcessInfo(NamedTuple):
    """One process among the others. local_devices: its accelerators, None for all it sees."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    local_devices: list[int] | None = None


def from_flags(
    coordinator: str | None, processes: int | None, process: int | None
) -> ProcessInfo | None:
    """Returns what the three flags say; None if none is given or there is only one process."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if coordinator is None or processes is None or process is None:
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
    return ProcessInfo(coordinator, processes, process) if processes > 1 else None


def from_scheduler() -> ProcessInfo | None:
    """Returns what SLURM, Open MPI, Cloud TPU or Kubernetes says; None for one process.

    JAX queries them, except where it would find more processes than there are: in a SLURM
    allocation that runs one task, or a Kubernetes pod outside an indexed job. Open MPI 5 no longer
    publishes the address of process 0; mpi4py broadcasts it.
    """
    ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 0))
    steps = os.environ.get("SLURM_STEP_NUM_TASKS")
    if ranks == 1 or (not ranks and steps == "1"):
        return None
    mpi = "OmpiCluster" if "OMPI_MCA_orte_hnp_uri" in os.environ else "Mpi4pyCluster"
    for cluster in jax_internals.cluster_types():
        name = cluster.__name__
        pod = name == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        if name != mpi if ranks else (cluster.opt_in_only_method or pod):
            continue
        try:
            if not cluster.is_env_present():
                continue
            count = cluster.get_process_count()
            if ranks and count != ranks:
                raise RuntimeError(f"mpirun runs {ranks} processes, mpi4py sees {count}")
            if count == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(START_SECONDS, port)
            return ProcessInfo(address, count, cluster.get_process_id(), _own_devices(cluster))
        except Exception as error:  # of a metadata server, a DNS, a variable that is not a number
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"{name} was detected but does not give the number and count of processes "
                f"({reason}); give --coordinator, --processes and --process, or --distributed=off "
                "for one process"
            ) from None
    if ranks:
        raise UserError(
            f"mpirun runs {ranks} processes but does not give the address of the first; install "
            "mpi4py, or give --coordinator HOST:PORT --processes $OMPI_COMM_WORLD_SIZE --process "
            "$OMPI_COMM_WORLD_RANK, or --distributed=off for independent processes"
        )
    return None


def _own_devices(cluster: Any) -> list[int] | None:
    """Returns the GPU with the task's number on its machine, as JAX does; None for all.

    None if the task is alone on its machine, or sees only one GPU, which is number 0.
    """
    number = cluster.get_local_process_id()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # per machine, such as 2(x3),1
    tasks = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", tasks)
    alone = all(part.split("(")[0] == "1" for part in tasks.split(","))
    return None if number is None or alone or (visible and "," not in visible) else [number]
