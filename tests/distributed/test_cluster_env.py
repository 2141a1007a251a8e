"""Which process of how many: flags and schedulers; and the launch scripts, with stand-ins."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from pgpsam_jax.distributed.cluster_env import ProcessInfo, from_flags, from_scheduler
from pgpsam_jax.errors import UserError
from tests.support.places import REPOSITORY

LAUNCH = REPOSITORY / "experiments" / "launch"
SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


@pytest.fixture
def set_variables(monkeypatch):
    """Only these of the variables that schedulers set."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION", "CUDA", "JAX_C")):
            monkeypatch.delenv(name)

    def set_them(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_them


def test_flags():
    assert from_flags(None, None, None) is None
    assert from_flags("host:5123", 1, 0) is None
    assert from_flags("[::1]:5123", 3, 2) == ProcessInfo("[::1]:5123", 3, 2)
    for given, said in {
        (None, 2, 0): r"go together; give --coordinator",
        ("host:1", None, None): r"give --processes and --process",
        ("host:1", 2, 2): r"--process 2 of --processes 2 does not exist",
        ("host:1", 0, 0): r"--process 0 of --processes 0 does not exist",
        ("host", 2, 0): r"--coordinator 'host' is not HOST:PORT",
        ("host:x", 2, 0): r"is not HOST:PORT",
        ("host:70000", 2, 0): r"is not HOST:PORT",
    }.items():
        with pytest.raises(UserError, match=said):
            from_flags(*given)


def test_nobody_is_asked_without_a_scheduler(set_variables):
    assert from_scheduler() is None


def test_slurm(set_variables):
    set_variables(**SLURM)
    assert from_scheduler() == ProcessInfo("node07:61444", 2, 1)  # the port is JAX's
    set_variables(JAX_COORDINATOR_PORT="7777")
    assert from_scheduler().coordinator == "node07:7777"


@pytest.mark.parametrize(
    "one",
    [
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # a shell in an allocation of four
        {"OMPI_COMM_WORLD_SIZE": "1"},  # mpirun -n 1 in an allocation of two
    ],
)
def test_one_task_is_a_process_alone(set_variables, one):
    set_variables(**SLURM | one)
    assert from_scheduler() is None


@pytest.mark.parametrize(
    ("tasks", "visible", "devices"),
    [
        ("1(x2)", "0,1,2,3", None),  # a task takes all GPUs of its machine
        ("1", "", None),
        ("4(x2)", "0,1,2,3", [3]),  # tasks that see each other's
        ("4(x2)", "", [3]),
        ("4(x2)", "0", None),  # --gpus-per-task=1: each sees its own, as number 0
        ("2,1", "0,1", [3]),
    ],
)
def test_gpus_of_a_task(set_variables, tasks, visible, devices):
    set_variables(**SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": "3"})
    set_variables(CUDA_VISIBLE_DEVICES=visible)
    assert from_scheduler().local_devices == devices


def test_open_mpi(set_variables):
    set_variables(**SLURM | MPI)  # mpirun in a SLURM job: its ranks count
    place = from_scheduler()
    assert place[1:] == (3, 2, [2])
    assert place.coordinator.startswith("10.96.0.1:")


MPI_5 = {name: value for name, value in MPI.items() if "uri" not in name}
MPI4PY = """
class COMM_WORLD:
    Get_size, Get_rank = staticmethod(lambda: {size}), staticmethod(lambda: 2)
    bcast = staticmethod(lambda value, root: "node07:61444")
    Split_type = staticmethod(lambda kind: COMM_WORLD)
COMM_TYPE_SHARED = 0
"""


@pytest.fixture
def mpi4py(tmp_path, monkeypatch):
    """Installs a stand-in for mpi4py whose module MPI has the given text."""

    def install(text: str):
        (tmp_path / "mpi4py").mkdir()
        (tmp_path / "mpi4py" / "__init__.py").touch()
        (tmp_path / "mpi4py" / "MPI.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in ("mpi4py", "mpi4py.MPI"):
        sys.modules.pop(name, None)


def test_open_mpi_5_needs_mpi4py(set_variables, monkeypatch):
    set_variables(**SLURM | MPI_5)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"mpirun runs 3 processes .* install mpi4py, or .*=off"):
        from_scheduler()


def test_open_mpi_5_with_mpi4py(set_variables, mpi4py):
    set_variables(**SLURM | MPI_5)
    mpi4py(MPI4PY.format(size=3))
    assert from_scheduler() == ProcessInfo("node07:61444", 3, 2, [2])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (MPI4PY.format(size=1), "mpirun runs 3 processes, mpi4py sees 1"),  # of another MPI
        ("raise RuntimeError('cannot load MPI library')", "cannot load MPI library"),
    ],
)
def test_mpi4py_of_another_mpi(set_variables, mpi4py, text, fault):
    set_variables(**MPI_5)
    mpi4py(text)
    with pytest.raises(UserError, match=rf"{fault}\); give --coordinator"):
        from_scheduler()


def test_a_pod_of_no_job_is_a_process_alone(set_variables, recwarn):
    set_variables(KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert from_scheduler() is None
    assert not recwarn.list


def test_a_scheduler_that_makes_no_sense(set_variables):
    set_variables(**SLURM | {"SLURM_NTASKS": "many"})
    with pytest.raises(UserError, match=r"SlurmCluster .* \(ValueError.*give --coordinator"):
        from_scheduler()


def run(script, *arguments, **variables):
    command = [LAUNCH / script, *arguments]
    return subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=30
    )


def stand_in(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """Variables with which slurm.sh finds stand-ins that write down what they are called with."""
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/requeued')
    return tmp_path, {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "PYTHON": "our python",
    }


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (2, False), (69, True), (75, False), (137, False)]
)
def test_slurm_script_passes_its_arguments_and_requeues(slurm, code, requeued):
    folder, variables = slurm
    stand_in(folder, "srun", f'printf "%s|" "$@" > {folder}/called; exit {code}')
    done = run("slurm.sh", "--config", "a b.py", **variables)
    called = (folder / "called").read_text()
    assert called == "--kill-on-bad-exit=1|our python|-m|pgpsam_jax.main|--config|a b.py|"
    assert (folder / "requeued").exists() is requeued
    assert done.returncode == (0 if requeued else code)
    done = run("slurm.sh", "--config", "x", SLURM_RESTART_COUNT="50", **variables)
    assert done.returncode == code


def test_slurm_script_requeues_before_its_time_is_over(slurm):
    folder, variables = slurm
    stand_in(folder, "srun", f"touch {folder}/runs; exec sleep 60")
    job = subprocess.Popen(
        [LAUNCH / "slurm.sh"], env=os.environ | variables, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 20
        while not (folder / "runs").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=20) == 0
        assert (folder / "requeued").read_text() == "requeue 17\n"
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(job.pid, signal.SIGKILL)


def test_scripts_for_the_cloud_pass_their_arguments():
    pod = run("tpu_pod.sh", "--workdir", "/a b", TPU="name", ZONE="zone", DRY_RUN="1")
    called, _, inner = pod.stdout.partition(" --command ")
    assert called == "gcloud compute tpus tpu-vm ssh name --zone zone --worker=all"
    program = r".venv/bin/python -m pgpsam_jax.main --workdir /a\ b"
    assert inner == f"cd pgpsam_jax && {program}\n"
    xpk = run("xpk.sh", "--config", "c.py", CLUSTER="k", TPU_TYPE="v5p-8", IMAGE="i", DRY_RUN="1")
    assert "--tpu-type v5p-8 --num-slices 1" in xpk.stdout
    assert xpk.stdout.endswith("--command python -m pgpsam_jax.main --config c.py\n")
    missing = run("xpk.sh", CLUSTER="k", IMAGE="i")
    assert missing.returncode and "set TPU_TYPE, for example v5litepod-16" in missing.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir()))
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


def test_gpus_script_wants_as_many_gpus_as_processes():
    done = run("gpus.sh", "3", CUDA_VISIBLE_DEVICES="4,5", PYTHON="python3")
    assert done.returncode == 2
    assert "3 processes but CUDA_VISIBLE_DEVICES lists only 2" in done.stderr
