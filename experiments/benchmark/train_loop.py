"""Times the training loop against its bare step, and a run of the paper's size."""

import json
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from experiments.benchmark.points import Point
from experiments.benchmark.scoring import synthetic_case
from experiments.measurement.points import SLICES
from experiments.measurement.synthetic_step import SyntheticStep, random_slices
from experiments.measurement.timing import quartiles
from pgpsam_jax.config import use_small_encoder
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.data.layouts.label_table import SYNAPSE8
from pgpsam_jax.data.layouts.split import BTCV_TEST, BTCV_TRAIN
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.device_batches import DeviceBatches
from pgpsam_jax.training.metric_logger import MetricLogger
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.train_loop import run_steps

TURNS = 8


def loop_benchmark(point: dict, turn: int = 40) -> dict:
    """Returns images/s of the loop (feed, log, progress bar) and of the bare step on a fixed batch.

    The two take turns of `turn` steps with the same compiled step on random slices; `ratio` has the
    quartiles over the turns of the loop's rate over the bare step's.
    """
    config = config_of(point)
    size, batch_size = config.model.image_size, config.train.batch_size
    config.train.steps = (2 * TURNS + 1) * turn
    mesh = device_mesh.make_mesh(**config.mesh)
    loader = make_loader(SLICES, batch_size=batch_size, seed=0)
    feed = DeviceBatches(
        random_slices(SLICES, size), loader, mesh, config.data.resident_gib * 2**30
    )
    step = SyntheticStep(config, mesh, lambda model: next(feed)[0])
    rates = TrainingPlan.from_config(config).learning_rates(SLICES)
    seconds: dict[str, list[float]] = {"bare": [], "loop": []}
    with (
        tempfile.TemporaryDirectory() as workdir,
        MetricLogger(Path(workdir), config.log, 0, rates, batch_size) as log,
    ):
        done = turn
        step(turn)  # warm-up
        for _ in range(TURNS):
            start = time.perf_counter()
            step(turn)
            middle = time.perf_counter()
            step.state, _, metrics, rows = run_steps(
                step.compiled, step.state, step.frozen, feed, done, done + turn, log.record
            )
            log.record(done + turn, metrics, rows)
            done += turn
            seconds["bare"].append((middle - start) / turn)
            seconds["loop"].append((time.perf_counter() - middle) / turn)
    loader.close()
    ratios = [bare / loop for bare, loop in zip(*seconds.values(), strict=True)]
    return {
        "batch_size": batch_size,
        "image_size": size,
        "resident": feed.resident,
        "images_per_second": {
            name: batch_size / statistics.median(values) for name, values in seconds.items()
        },
        "ratio": quartiles(ratios),
    }


def config_of(point: dict):
    """Returns the configuration of a point; vit_t has the sizes of the small encoder's preset."""
    config = Point(**point).config()
    if config.model.encoder == "vit_t":
        use_small_encoder(config)
        config.train.batch_size = point["batch"]
    return config


def run_benchmark(point: dict, depth: int = 120, side: int = 512, epochs: int = 300) -> dict:
    """Returns the seconds per activity of a run of the paper's size, from reading to pictures.

    18 training volumes hold the 221 slices; 12 test volumes of `depth` slices of `side` pixels are
    scored. The volumes are synthetic and written before the clock starts.
    """
    from pgpsam_jax.training.train import train

    config = config_of(point)
    config.data.layout, config.fewshot.pool = "btcv", "all"
    config.fewshot.count, config.train.epochs = SLICES, epochs
    with tempfile.TemporaryDirectory() as folder:
        config.data.root = f"{folder}/data"
        for case in (*BTCV_TRAIN, *BTCV_TEST):
            write_volume(Path(config.data.root), case, depth if case in BTCV_TEST else 24, side)
        start = time.perf_counter()
        train(config, f"{folder}/run")
        seconds = time.perf_counter() - start
        parts = json.loads(Path(folder, "run", "timing.json").read_text())
    return {"seconds": {"total": seconds} | parts, "epochs": epochs, "slices": SLICES}


def write_volume(root: Path, case: int, depth: int, side: int) -> None:
    """Writes a synthetic case in the BTCV layout: organs of uniform intensity, and noise."""
    _, truth, spacing = synthetic_case(case, (depth, side, side))
    source = np.array([0, *(entry["source"][0] for entry in SYNAPSE8.to_json()["classes"])])
    noise = np.random.default_rng(case).integers(-40, 40, truth.shape, np.int16)
    image = (noise - 60 + 25 * truth).astype(np.int16)
    affine = np.diag([*spacing[::-1], 1.0])
    folder = root / "RawData" / "Training"
    for name, stem, array in (("img", "img", image), ("label", "label", source[truth])):
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture = nib.Nifti1Image(array.astype(np.int16).transpose(2, 1, 0), affine)
        nib.save(picture, folder / name / f"{stem}{case:04d}.nii.gz")
