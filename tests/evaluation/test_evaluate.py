"""Evaluation with worker processes: the same files as without, and what happens when one fails."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments.benchmark import scoring
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.evaluate import evaluate
from pgpsam_jax.metrics import surface
from pgpsam_jax.metrics.overlap import overlap_counts
from pgpsam_jax.runtime import worker_pool
from tests.reference.surface_oracle import oracle_surface
from tests.support import mask_scores
from tests.support.small_run import write_data
from tests.support.worker_jobs import echo, refuse

NAMES = ("a", "b", "c")


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint8, (3, 4, 4), elements=st.integers(0, 2)))
def test_surfaces_of_a_map_are_those_of_its_masks(ids):
    points, classes = surface.surface_points(ids)
    for k in (1, 2):
        wanted = [tuple(map(int, point)) for point in oracle_surface(ids == k)]
        assert list(map(tuple, points[classes == k].tolist())) == wanted


maps = hnp.arrays(np.uint8, (2, 3, 3), elements=st.integers(0, 3))


@settings(max_examples=30, deadline=None)
@given(maps, maps)
def test_overlaps_count_voxels(prediction, truth):
    counts = overlap_counts(prediction, truth, 4)
    for z in range(2):
        for k in (1, 2, 3):
            ours, theirs = prediction[z] == k, truth[z] == k
            wanted = [(ours & theirs).sum(), ours.sum(), theirs.sum()]
            assert counts[:, z, k - 1].tolist() == wanted


def test_several_spacings_at_once_are_each_alone():
    first, second, spacing = scoring.synthetic_case(shape=(12, 48, 48))
    region = np.arange(12) > 4
    for k in range(1, len(scoring.NAMES)):
        edges = [surface.surface_points(ids == k)[0] for ids in (first, second)]
        steps = spacing, (1.0, 1.0, 1.0), (5.0, 0.1, 2.0)
        together = surface.point_distances(*edges, steps, region)
        for step, found in zip(steps, together, strict=True):
            alone = mask_scores.surface_distances(first == k, second == k, step, region)
            for ours, theirs in zip(found, alone, strict=True):
                np.testing.assert_array_equal(ours, theirs)


class Threshold:
    """Stands for a trained model: the two balls by their brightness, noise and all."""

    preprocessing = Preprocessing(32, (-125.0, 275.0))
    oracle = False

    def __call__(self, volume):
        return np.digitize(volume.array, (95, 165)).astype(np.uint8)


@pytest.fixture
def cases(tmp_path):
    root = write_data(tmp_path / "data", NAMES)
    table = load_label_table(root / "table.json")
    return [
        Case(name, root / "images" / f"{name}.nii.gz", root / "labels" / f"{name}.nii.gz")
        for name in NAMES
    ], table


def run(cases, folder, count, **options):
    options = {"nsd_tolerance_mm": 2.0, "min_pixels": 3, "overlays": True} | options
    return evaluate(Threshold(), *cases, folder, workers=count, **options)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_change_no_file(cases, tmp_path, count):
    """Tables, masks and pictures of two cases by other processes, byte for byte."""
    cases = cases[0][:2], cases[1]
    odd = {"region_of": lambda case, truth: np.arange(len(truth)) % 2 == (case == "b")}
    summaries = [run(cases, tmp_path / str(number), number, **odd) for number in (0, count)]
    assert summaries[0] == summaries[1] and 0 < summaries[0]["strict"]["dice_class_mean"] < 1
    written = [
        {path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*.*")}
        for name in ("0", str(count))
    ]
    assert written[0].keys() == written[1].keys() and len(written[0]) > 4 + 2 + 2
    for ours, theirs in zip(*(sorted(one.values()) for one in written), strict=True):
        pair = [path.read_bytes() for path in (ours, theirs)]
        if ours.suffix == ".gz":  # whose header holds the time of writing
            pair = [gzip.decompress(one) for one in pair]
        assert pair[0] == pair[1], ours
    rows = (tmp_path / str(count) / "cases.csv").read_text().splitlines()[1:]
    assert list(dict.fromkeys(row.split(",")[0] for row in rows)) == list(NAMES[:2])


def test_intervals_are_over_known_groups(cases, tmp_path):
    """Of three cases, two of one person: an interval of two means."""
    grouped = [replace(case, group="cd"[case.case_id == "c"]) for case in cases[0]]
    summary = run((grouped, cases[1]), tmp_path / "out", 0, overlays=False)
    plain = run(cases, tmp_path / "plain", 0, overlays=False)
    assert summary["n_groups"] == 2 and "n_groups" not in plain and summary["n_cases"] == 3
    assert summary["strict"]["dice_case_mean"] == plain["strict"]["dice_case_mean"]
    assert summary["strict"]["dice_case_ci95"] != plain["strict"]["dice_case_ci95"]
    assert "over 2 groups" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize("count", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_is_the_same_sentence(cases, tmp_path, count):
    class Wrong(Threshold):
        def __call__(self, volume):
            return super().__call__(volume) + np.uint8(volume.source.path.name[0] == "b") * 7

    options = {"nsd_tolerance_mm": 2.0, "min_pixels": 3, "overlays": False, "workers": count}
    with pytest.raises(UserError, match=r"^case b: the prediction has class 9, but the label"):
        evaluate(Wrong(), *cases, tmp_path / "out", **options)


def test_an_error_in_a_process_is_the_same_sentence():
    jobs = worker_pool.map_in_order(refuse, ["case b: no"], 1)
    with pytest.raises(UserError, match=r"^case b: no"):
        list(jobs)


def test_a_killed_process_gets_a_sentence():
    jobs = worker_pool.map_in_order(signal.raise_signal, [signal.SIGKILL], 1)
    with pytest.raises(UserError, match=r"killed \(signal 9\).*eval\.workers"):
        list(jobs)


def test_order_bound_and_end():
    """Answers come in order; no more than two jobs wait; processes are gone when left midway."""
    alive = []

    def jobs():
        for job in range(9):
            alive.append(job)
            yield job

    found = []
    for job, process in worker_pool.map_in_order(echo, jobs(), 2):
        assert len(alive) <= job + 3 and process != os.getpid()
        found.append((job, process))
    assert [job for job, _ in found] == list(range(9))
    left = worker_pool.map_in_order(echo, range(9), 1)
    _, process = next(left)
    left.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_an_interrupt_ends_the_processes():
    """Ctrl-C while a job is made: it passes on, and no process is left."""
    seen = []

    def jobs():
        yield 0
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seen.extend(process for _, process in worker_pool.map_in_order(echo, jobs(), 1))
    for process in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert seen


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    large = 120 * 512 * 512
    assert (
        worker_pool.worker_count(-1, 12, 12 * large) == 3
    )  # cores it may use, not those there are
    assert worker_pool.worker_count(-1, 2, 2 * large) == 2
    assert worker_pool.worker_count(-1, 1, large) == 0  # nothing to work beside
    assert worker_pool.worker_count(-1, 12, 12 * 50_000) == 0  # not worth a start
    assert worker_pool.worker_count(0, 12, 12 * large) == 0
    assert worker_pool.worker_count(5, 12, 12) == 5
    with pytest.raises(UserError, match=r"eval\.workers is -2; give"):
        worker_pool.worker_count(-2, 12, 12)


def test_reading_ahead_keeps_order_and_errors():
    assert list(worker_pool.map_ahead(str, [3, 1, 2])) == ["3", "1", "2"]
    found = worker_pool.map_ahead(int, ["4", "x"])
    assert next(found) == 4
    with pytest.raises(ValueError):
        next(found)


def test_workers_do_not_load_jax():
    """JAX takes time to start, and memory on the device; `verify` does without it, too."""
    code = """if True:
        import sys
        import experiments.benchmark.scoring, pgpsam_jax.visualization.overlays
        import pgpsam_jax.evaluation.outputs, pgpsam_jax.runtime.worker_pool, pgpsam_jax.verify
        heavy = "jax", "flax", "grain", "orbax", "torch"
        print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_benchmark_times_every_part():
    found = scoring.scoring_benchmark(shape=(12, 48, 48), repeats=2)
    parts = "total counts surfaces distances_mm distances_voxels release".split()
    assert list(found["seconds"]) == parts and found["organs"] == 8
    for low, middle, high in found["seconds"].values():
        assert 0 <= low <= middle <= high
    assert json.loads(json.dumps(found)) == found


def test_the_synthetic_case_is_a_plausible_prediction():
    prediction, truth, spacing = scoring.synthetic_case(shape=(30, 128, 128))
    dice = {}
    for k, name in enumerate(scoring.NAMES[1:], start=1):
        dice[name] = surface.dice(prediction == k, truth == k)
        assert (truth == k).any()
    assert dice.pop("gallbladder") == 0 and all(0.6 < one < 0.99 for one in dice.values())
    liters = (truth == 1).sum() * np.prod(spacing) / 1e6
    assert 1.0 < liters < 2.5  # a liver


@pytest.mark.parametrize("count", [0, 2])
def test_what_an_error_leaves_behind_may_be_collected_anywhere(count):
    """The collector may run while a thread starts, which holds the lock that joining takes."""

    def left():
        things = (
            worker_pool.map_in_order(echo, range(9), count)
            if count
            else worker_pool.map_ahead(echo, range(9))
        )
        next(things)
        return things

    abandoned = left()

    def collect():
        with getattr(threading, "_shutdown_locks_lock", contextlib.nullcontext()):
            abandoned.close()

    # A thread of its own, so that a deadlock fails the test instead of stopping it.
    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
