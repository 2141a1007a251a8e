"""The benchmark: both models are one, the command line end to end, resumption, rows and table."""

import contextlib
import dataclasses
import functools
import re
from unittest import mock

import jax
import numpy as np
import pytest

from experiments.benchmark import __main__ as program
from experiments.benchmark import (
    feature_cache,
    random_weights,
    runner,
    sam_jax,
    steps_jax,
)
from experiments.benchmark.points import STEPS, SUITES, Point, cross, with_ceilings
from experiments.benchmark.table import BENCHMARK, markdown
from experiments.measurement import csv_table, timing, worker, worker_process
from experiments.measurement.csv_table import FAILED, OK, TOO_LARGE
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.profiling import flops
from tests.support import launcher, micro
from tests.support.optional import OptionalModule, torch
from weights_conversion.remap import write

sam_torch = OptionalModule("experiments.benchmark.sam_torch")
CLASSES = {"pgpsam": 9, "sam": 3}
CONFIG = SamConfig.preset(micro.NAME, 80, 8)  # 10 cells a side: windows of 4 overhang the grid
TINY = SamConfig.preset("tiny_vit", 40, 4, depths=(1, 1, 1, 1))  # and those of 7 and 14
TINY = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, depth=1, mlp_dim=64))
CONFIGS = {"vit": CONFIG, "tiny_vit": TINY}
BATCH = 2


def keeping(found: list, function):
    """The function, which puts what it returns into a list, too."""

    def kept(*arguments):
        found.append(function(*arguments))
        return found[-1]

    return kept


@functools.cache
def ours(encoder):
    """(logits, loss, gradients by PyTorch's names) of the JAX side."""
    config = CONFIGS[encoder]
    graphdef, params, frozen = sam_jax.build(config, np.float32)
    images, labels = batch_of(config)

    @jax.jit
    def run(params, frozen):
        found = []

        def loss(params):
            with mock.patch.object(sam_jax, "predict", keeping(found, sam_jax.predict)):
                value = sam_jax.loss(graphdef, params, frozen, images, labels)
            return value, found[0]

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, value, gradients

    logits, value, gradients = run(params, frozen)
    found = {path: np.asarray(leaf[...]) for path, leaf in flat_paths(gradients).items()}
    return np.asarray(logits), float(value), by_their_names(config, found, frozen)


def batch_of(config):
    return random_weights.batch(BATCH, config.image_size[0], random_weights.CLASSES, channels=True)


def by_their_names(config, gradients: dict, frozen) -> dict:
    lora = {path: gradients.pop(path) for path in list(gradients) if "/lora/" in path}
    rest = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flat_paths(frozen).items()}
    named = write(sam_jax.layout_of(config), rest | gradients)
    for path, gradient in lora.items():
        block = ".blocks.".join(re.findall(r"\d+", path))
        named[f"vision_encoder.layers.{block}.attn.qkv.{path[-1]}"] = gradient
    return named


CASES = [
    ("vit", "sdpa"),
    ("vit", "eager"),
    pytest.param(("tiny_vit", "eager"), marks=pytest.mark.slow),  # `test_tiny_vit` has it forward
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def both(request):
    """`ours`, and (logits, loss, model with gradients) of the PyTorch side."""
    encoder, attention = request.param
    config = CONFIGS[encoder]
    sizes = dataclasses.asdict(config)
    model = sam_torch.build(sizes, sam_torch.load_tensors(sizes), attention)
    images, labels = batch_of(config)
    images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    value = sam_torch.loss(model, images, torch.from_numpy(labels).long())
    value.backward()
    logits = sam_torch.predict(model, images).detach().movedim(1, -1).numpy()
    return ours(encoder), (logits, value.item(), model)


def test_equal_logits_and_loss(both):
    ours, theirs = both
    assert np.linalg.norm(ours[0] - theirs[0]) < 1e-5 * np.linalg.norm(theirs[0])
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)


def test_equal_gradients_of_all_that_trains(both):
    """LoRA and decoder, nothing else. A key's bias, which no softmax sees, has but rounding."""
    ours, theirs = both
    expected = {n: p.grad.numpy() for n, p in theirs[2].named_parameters() if p.requires_grad}
    trained = {n for n in ours[2] if n.startswith("mask_decoder") or n[-2:] in (".a", ".b")}
    assert expected.keys() == {n for n in trained if "iou_prediction_head" not in n}
    adapted = [name for name, _ in theirs[2].named_modules() if name.endswith(".attn.qkv")]
    assert sum(n[-2:] in (".a", ".b") for n in expected) == 2 * len(adapted) >= 4
    largest = max(map(np.linalg.norm, expected.values()))
    for name, gradient in expected.items():
        silent = "k_proj.bias" in name or "hypernetworks_mlps.0." in name
        assert silent or np.linalg.norm(gradient) > 1e-5 * largest, name
        error = np.linalg.norm(ours[2][name] - gradient)
        assert error < 1e-4 * np.linalg.norm(gradient) + 1e-6 * largest * silent, name


def run(folder, *arguments) -> tuple[int, dict[str, dict], str]:
    """Exit code, rows and Markdown of a command line."""
    code = program.main([*arguments, "--output", str(folder)])
    rows = csv_table.load(folder, BENCHMARK)
    return code, rows, (folder / "benchmark.md").read_text()


SMALL = ("--encoders", micro.NAME, "--sizes", "64", "--steps", "2")


@pytest.fixture
def knowing(monkeypatch):
    """Processes know the smallest encoder."""
    monkeypatch.setenv("PYTHONPATH", launcher.environment(1, launcher.KNOWING)["PYTHONPATH"])


@pytest.fixture
def one_process(monkeypatch, knowing):
    """All points of a command line are asked of one process, which has to be started only once."""
    with runner.Process() as worker_process:
        monkeypatch.setattr(runner, "Process", lambda: contextlib.nullcontext(worker_process))
        yield


@pytest.mark.slow  # its parts are tested with measures of no process
def test_a_command_line(tmp_path, capsys, one_process):
    """A point that is measured, one that fails, and what bounds both."""
    arguments = ("--tasks", "encoder", "--models", "sam", *SMALL, "--attention", "auto,nonsense")
    code, rows, text = run(tmp_path, *arguments)
    assert code == 1 and len(rows) == 3
    row = rows[f"encoder sam {micro.NAME} 64 1 float32"]
    assert row["device"] == "cpu" and row["mfu"] is None and "jax" in row["versions"]
    low, high = row["first_quartile_seconds"], row["third_quartile_seconds"]
    assert 0 < low <= row["median_seconds"] <= high
    assert row["steps"] == 2 and row["peak_bytes"] > row["temporary_bytes"] > 0
    failed = rows[f"encoder sam {micro.NAME} 64 1 float32 attention nonsense"]
    assert "nonsense" in failed["reason"] and failed["median_seconds"] is None
    assert "matmul float32: size 1024" in text and "**failed**" in text
    assert "failed" in capsys.readouterr().out


@pytest.mark.slow
def test_command_line_end_to_end(tmp_path, capsys, knowing):
    """Training in turns with PyTorch, a point that fails; the paper's model in another start."""
    arguments = (
        "--tasks",
        "training",
        *SMALL,
        "--against",
        "torch",
        "--attention",
        "auto,nonsense",
    )
    code, rows, text = run(tmp_path, *arguments)
    assert code == 1 and len(rows) == 3
    row = rows[f"training sam {micro.NAME} 64 1 float32 against torch"]
    assert row["device"] == "cpu" and row["mfu"] is None and "jax" in row["versions"]
    low, high = row["first_quartile_seconds"], row["third_quartile_seconds"]
    assert 0 < low <= row["median_seconds"] <= high
    assert row["images_per_second"] == pytest.approx(1 / row["median_seconds"])
    assert row["aliased_bytes"] > 0 and row["peak_bytes"] > row["temporary_bytes"] > 0
    theirs = row["torch"]["eager"]
    assert theirs["attention"] in ("sdpa", "eager") and theirs["peak_bytes"] > 0
    assert theirs["turns"] == 1  # of two steps each
    assert theirs["steps"] == row["steps"] == 2
    failed = rows[f"training sam {micro.NAME} 64 1 float32 attention nonsense against torch"]
    assert "nonsense" in failed["reason"] and failed["median_seconds"] is None
    assert rows["matmul float32"]["record"]["flops_per_second"] > 1e8
    assert "matmul float32: size 1024" in text and "**failed**" in text
    assert f"torch eager {theirs['attention']}" in text and text.count("| training ") == 2
    assert "failed" in capsys.readouterr().out

    code, rows, text = run(tmp_path, "--tasks", "inference", *SMALL)
    assert code == 0 and len(rows) == 4  # with those of the first start
    assert rows[f"inference pgpsam {micro.NAME} 64 1 float32"]["steps"] == 2
    assert text.count("| training ") == 2 and text.count("| inference ") == 1


@pytest.mark.parametrize("model", [pytest.param("pgpsam", marks=pytest.mark.slow), "sam"])
@pytest.mark.parametrize("task", STEPS)
def test_a_step_takes_what_it_gives(model, task):
    """Its outputs go back where they came from, in both types, with nothing computed."""
    point = Point(micro.NAME, 64, 2, dtype="bfloat16", task=task, model=model)
    make = {"pgpsam": steps_jax._pgpsam, "sam": steps_jax._sam}[model]
    function, donated, arguments, feed_back, counted = make(point)
    out = jax.eval_shape(function, *arguments)
    again, before = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        for tree in (feed_back(out, arguments), tuple(arguments))
    )
    assert again == before
    assert bool(donated) == (task == "training")
    if task != "training":
        grid, width = {"encoder": (4, 32), "inference": (16, CLASSES[model])}[task]
        assert out.shape == (2, grid, grid, width)
    assert flops.total(counted).forward > 1e6


class Scripted:
    """A worker whose steps take the seconds of a list."""

    def __init__(self, *seconds):
        self.seconds, self.asked = list(seconds), []

    def ask(self, steps):
        assert len(self.seconds) >= steps, "asked for more steps than the list has"
        self.asked.append(steps)
        taken, self.seconds = self.seconds[:steps], self.seconds[steps:]
        return {"seconds": taken}


def test_turns_on_a_cpu():
    """Two steps each, after one that is not timed; a slow moment hits both sides of a ratio."""
    ours, theirs = Scripted(9.0, 1.0, 3.0, 9.0, 4.0, 4.0), Scripted(9.0, 4.0, 4.0, 9.0, 6.0, 10.0)
    own, other, ratios = runner.take_turns(ours, theirs, "cpu", timing.Effort(3, 1e9))
    assert (own, other, ratios) == ([1.0, 3.0, 4.0, 4.0], [4.0, 4.0, 6.0, 10.0], [2.0, 2.0])
    assert ours.asked == theirs.asked == [1, 2, 1, 2]


@pytest.mark.parametrize(("budget", "turns"), [(0.0, 5), (27.0, 7)])
def test_turns_end_with_the_budget_of_a_cpu(budget, turns):
    """Four timed seconds a turn; five turns in any case."""
    ours, theirs = Scripted(*[1.0] * 99), Scripted(*[1.0] * 99)
    effort = timing.Effort(50, budget)
    assert len(runner.take_turns(ours, theirs, "cpu", effort)[2]) == turns


def test_turns_on_an_accelerator():
    """Five steps each, after one that is not timed."""
    ours = Scripted(9.0, *[1.0] * 5, 9.0, *[2.0] * 5)
    theirs = Scripted(9.0, *[3.0] * 5, 9.0, *[4.0] * 5)
    own, other, ratios = runner.take_turns(ours, theirs, "gpu", timing.Effort(10, 0.0))
    assert own == [1.0] * 5 + [2.0] * 5 and other == [3.0] * 5 + [4.0] * 5
    assert ratios == [3.0, 2.0] and ours.asked == [1, 5, 1, 5]


STEP = {
    "device": "cpu", "platform": "cpu", "versions": "jax 1", "compile_seconds": 2.0,
    "flops_per_image": 3e9, "padding_flops_per_image": 1e9, "temporary_bytes": 2**29,
    "peak_bytes": 2**30, "median_seconds": 0.5, "first_quartile_seconds": 0.4,
    "third_quartile_seconds": 0.75, "steps": 4,
}  # fmt: skip


def fake(point, effort):
    """A row without a process; `out of memory` at batch 4, another failure at batch 3."""
    if point.task == "matmul":
        return {"status": OK, "record": {"device": "cpu", "flops_per_second": 24e9}}
    if point.batch == 4:
        return {"status": TOO_LARGE, "reason": "out of memory: 9 GB"}
    if point.batch == 3:
        return {"status": FAILED, "reason": "TypeError: x"}
    return {"status": OK} | STEP | timing.rates(STEP, point.batch, point.dtype)


def test_a_rerun_does_what_is_missing(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(program, "measure", lambda p, effort: done.append(p) or fake(p, effort))
    first = ("--tasks", "inference", "--batches")
    assert run(tmp_path, *first, "1,3,4")[0] == 1
    assert [p.batch for p in done] == [1, 1, 3, 4] and done[0].task == "matmul"
    done.clear()
    code, rows, _ = run(tmp_path, *first, "1,2,3,4")
    assert code == 1 and [p.batch for p in done] == [2, 3]
    assert len(rows) == 5


def test_a_stopped_run_keeps_its_rows(tmp_path, monkeypatch):
    def stop(point, effort):
        if point.batch == 2:
            raise KeyboardInterrupt
        return fake(point, effort)

    monkeypatch.setattr(program, "measure", stop)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--tasks", "inference", "--batches", "1,2")
    assert ended.value.code == 130
    assert len(csv_table.load(tmp_path, BENCHMARK)) == 2
    assert "| inference " in (tmp_path / "benchmark.md").read_text()


def test_markdown_by_hand():
    points = [Point(task="matmul"), Point(batch=2), Point(task="encoder", batch=3)]
    rows = [dataclasses.asdict(point) | fake(point, None) for point in points]
    text = markdown(rows)
    (line,) = [line for line in text.splitlines() if line.startswith("| training")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # 2 images in 0.5 s of 3 GFLOP are 12 of 24 GFLOP/s; a CPU has no peak.
    assert cells == ["training", "pgpsam vit_b", "512", "2", "fp32", "jax", "4", "500 (400-750)",
                     "3 + 1", "", "50.0%", "1.00", "0.50", "2.0", ""]  # fmt: skip
    assert "- encoder pgpsam vit_b 512 3 float32: **failed**, TypeError: x" in text
    known = rows[1] | {"device": "NVIDIA H200", "dtype": "bfloat16"}
    known |= timing.rates(known, 2, "bfloat16")
    assert known["mfu"] == pytest.approx(12e9 / 989e12)
    assert re.search(r" 0\.0% \| +\|", markdown([known]))  # of matmul: none was measured there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "walk"], "task 'walk' unknown"),
        (["--batches", "1,x"], "not a list of numbers"),
        (["--batches", "0"], "must be 1 or more"),
        (["--steps", "0"], "--steps"),
        (["--against", "torch", "--models", "pgpsam"], "no counterpart"),
        (["--tasks", "encoded"], "take the methods with a frozen encoder"),
        (["--tasks", "training", "--models", "samlst"], "the other tasks do not"),
        (["--against", "torch", "--tasks", "scoring"], "no counterpart"),
    ],
)
def test_mistakes_are_sentences(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([*arguments, "--output", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_broken_file_is_a_sentence(tmp_path):
    for text in ("", "{", "encoder,image_size\nvit_b,512\n"):
        (tmp_path / "benchmark.csv").write_text(text)
        with pytest.raises(UserError, match=r"benchmark\.csv cannot be .*give another --output"):
            csv_table.load(tmp_path, BENCHMARK)


@pytest.mark.parametrize("name", runner.TASKS.values())
def test_every_task_has_its_function(name):
    assert callable(worker._find(f"experiments.benchmark.{name}"))


def test_points():
    points = cross(task=["encoder", "training"], dtype=["float32", "bfloat16"], batch=[1, 2])
    assert len({point.key for point in points}) == 8
    ceilings = with_ceilings(points)
    assert [point.key for point in ceilings[:2]] == ["matmul float32", "matmul bfloat16"]
    for suite in SUITES.values():
        points = with_ceilings(suite())
        assert len({point.key for point in points}) == len(points)


@pytest.mark.slow
def test_encoding_beforehand_saves_the_encoder():
    """Its products, and what is counted of it and of augmenting besides: measured 9.8 % more."""
    point = Point("vit_t", batch=2, task="encoded_flops", model="samlst")
    counted = feature_cache.encoded_flops(dataclasses.asdict(point))["flops_per_image"]
    config = SamConfig.preset("vit_t", 128, 8).encoder
    products = flops.total(flops.encoder(config, None, "frozen")).forward
    assert products < counted["whole"] - counted["encoded"] < 1.15 * products


def test_a_process_that_dies_is_a_failed_point(monkeypatch):
    monkeypatch.setattr(worker_process.sys, "executable", "/bin/false")
    row = runner.measure(Point(task="scoring"), timing.Effort())
    assert row["reason"].startswith("the process ended with code 1")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        lambda: RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        lambda: torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_too_little_memory_is_told_alike(error):
    assert worker_process.reason(error()).startswith("out of memory")


def test_other_failures_name_their_type():
    assert worker_process.reason(ValueError("a\nb")) == "ValueError: a b"
