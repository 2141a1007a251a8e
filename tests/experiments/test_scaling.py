"""The scaling study: points, the search of a batch, the estimate, the folder, both commands."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from experiments.measurement import csv_table as table
from experiments.measurement.csv_table import FAILED, OK, TOO_LARGE
from experiments.measurement.worker_process import Failed
from experiments.scaling import __main__ as program
from experiments.scaling import compiled, points, render, roofline, study
from experiments.scaling.hlo_collectives import KINDS, Collective
from experiments.scaling.kinds import COMPILED, MEASURED
from experiments.scaling.points import Compiled, Measured
from pgpsam_jax.errors import UserError
from pgpsam_jax.profiling import accelerators, aot

SMALL = ("--encoders", "vit_t", "--sizes", "64")


@pytest.mark.parametrize(
    ("name", "slice_name"),
    [
        ("v5p:8x8x8", "v5p-1024"),
        ("v4:2x2x1", "v4-8"),
        ("v5e:16x16", "v5e-256"),
        ("v6e:2x4", "v6e-8"),
    ],
)
def test_names_of_slices(name, slice_name):
    assert aot.slice_name(name) == slice_name


def test_links():
    """Cloud TPU closes sides of 16 chips of v5e and v6e, and slices of whole cubes of v4, v5p."""

    def whole(name):
        _, shape = aot.parse_topology(name)
        x, y, z = (*shape, 1)[:3]
        return aot.links(name, [(i, j, k) for i in range(x) for j in range(y) for k in range(z)])

    assert [whole(n) for n in ("v5e:1x1", "v5e:2x2", "v5e:8x16", "v6e:16x16")] == [0, 2, 3, 4]
    assert [whole(n) for n in ("v4:2x2x1", "v4:2x2x4", "v5p:4x4x8", "v5p:8x8x8")] == [2, 3, 6, 6]
    assert aot.links("v5e:16x16", [(0, j, 0) for j in range(16)]) == 2
    assert aot.links("v5e:16x16", [(0, j, 0) for j in range(4)]) == 1


def test_meshes_in_words():
    assert points.mesh_sizes("data") == {"data": -1, "fsdp": 1, "tensor": 1}
    assert points.mesh_sizes("tensor4") == {"data": -1, "fsdp": 1, "tensor": 4}
    assert points.mesh_sizes("fsdp+tensor2") == {"data": 1, "fsdp": -1, "tensor": 2}
    assert points.mesh_sizes("data2+fsdp4") == {"data": 2, "fsdp": 4, "tensor": 1}
    config = Compiled(mesh="fsdp+tensor2", batch=3).config(16)
    assert config.train.batch_size == 3 * 8 and dict(config.mesh)["fsdp"] == -1


def test_weak_and_strong_points():
    lists = dict(encoder=["vit_t"], batch=[2], mesh=["data"])
    found = points.measured_points(6, [], ["weak", "strong"], True, **lists)
    assert [(p.scaling, p.devices, p.batch) for p in found] == [
        *(("weak", n, 2) for n in (1, 2, 4, 6)), ("strong", 1, 12), ("strong", 2, 6),
        ("strong", 4, 3), ("strong", 6, 2),
    ]  # fmt: skip
    assert all(p.simulated for p in found)


@given(st.integers(10, 10**6), st.integers(1, 10**4), st.integers(0, 10**6), st.booleans())
def test_search_of_the_largest_batch(limit, each, fixed, refused_unlike):
    """Within a sixteenth of the largest that fits, in few steps, whatever is said of the rest."""
    known, tried = {}, []
    while (batch := study.next_batch(known, 4096)) is not None:
        assert batch not in known and 1 <= batch <= 4096
        tried.append(batch)
        needs = fixed + each * batch
        told = limit + 1 if refused_unlike and needs > limit else needs
        known[batch] = needs <= limit, told, limit
    best = max((b for b in tried if known[b][0]), default=0)
    largest = min(max((limit - fixed) // each, 0), 4096)
    assert best <= largest and largest - best <= max(best // 16 - 1, 0)
    assert len(tried) <= 14, tried


RATE = st.floats(1.0, 1e15)


@given(RATE, RATE, RATE, st.sampled_from(sorted(accelerators.CHIPS)))
def test_the_estimate_is_the_largest_term(flops, accessed, received, kind):
    chip = accelerators.find_chip(kind)
    term = roofline.estimate(chip, flops, accessed, received / 1e10)
    assert term.seconds == getattr(term, term.binds) == max(term)
    assert term.compute == pytest.approx(flops / chip.bf16_flops)
    assert term.hbm == pytest.approx(accessed / chip.memory_bandwidth)
    doubled = roofline.estimate(chip, 2 * flops, 2 * accessed, 2 * received / 1e10)
    assert doubled.seconds == pytest.approx(2 * term.seconds)


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.floats(0, 1e9), st.integers(1, 30)), max_size=5)
)
def test_the_network_term_adds_up(found):
    """Over all sixteen chips of a 4x4 slice two links serve; a permutation has one."""
    chip = accelerators.find_chip("TPU v5e")
    group, places = tuple(range(16)), [(i // 4, i % 4, 0) for i in range(16)]
    exchanged = [Collective(kind, size, group, times, True) for kind, size, times in found]
    seconds = roofline.exchange_seconds(chip, "v5e:4x4", exchanged, places)
    assert seconds == pytest.approx(
        sum(
            times * size / (4.5e10 * (1 if kind == "collective-permute" else 2))
            for kind, size, times in found
        )
    )
    totals = roofline.by_kind(exchanged)
    assert set(totals) == set(KINDS)
    assert sum(count for count, _ in totals.values()) == sum(times for *_, times in found)


def test_what_a_refused_program_needs():
    text = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert compiled.needed_bytes(text) == int(20.5 * 2**30)
    assert compiled.needed_bytes("Used 3.00K of 2.00K vmem") is None


def fake(point: Compiled) -> dict:
    """A row without compiling: 2 GB and 1 GB an image; image size 96 fails."""
    if point.image_size == 96:
        raise Failed("no answer in 1 s")
    count = 1
    for side in aot.parse_topology(point.topology)[1]:
        count *= side
    total, limit = int(2e9 + 1e9 * point.batch), int(15e9)
    row = {
        "slice": aot.slice_name(point.topology), "chips": count, "total_bytes": total,
        "limit_bytes": limit, "compile_seconds": 2.0, "status": OK if total <= limit else TOO_LARGE,
        "global_batch": count * point.batch,
    }  # fmt: skip
    if row["status"] == TOO_LARGE:
        return row
    rate = point.batch * count**0.9
    row |= dict.fromkeys((name for name, of in COMPILED.columns.items() if of is float), 0.5)
    row |= {"estimate_images_per_second": rate, "estimate_binds": "hbm"}
    row |= {"estimate_hbm_seconds": 1.0, "compile_seconds": 2.0, "loops_unknown": 0}
    return row | {"arguments_bytes": 10**9, "temporaries_bytes": total - 10**9}


def run(folder, *arguments) -> int:
    return program.main([*arguments, "--output", str(folder)])


@pytest.fixture
def without_compiling(monkeypatch):
    """The points that were asked for, which `fake` answers; nothing is drawn."""
    asked = []
    monkeypatch.setattr(render, "_draw", lambda make, rows, path: None)
    monkeypatch.setattr(program, "compile_with", lambda limit: lambda p: asked.append(p) or fake(p))
    return asked


def test_a_study_goes_on_where_it_was(tmp_path, without_compiling):
    """A point that failed is a row with its reason, tried again on request alone."""
    arguments = ("compiled", "--topologies", "v5e:2x2,v5e:4x4", "--encoders", "vit_t,vit_b")
    assert run(tmp_path, *arguments, "--sizes", "64,96") == 1
    assert len(without_compiling) == 8
    rows = table.load(tmp_path, COMPILED)
    assert sorted(row["status"] for row in rows.values()) == [FAILED] * 4 + [OK] * 4
    assert {row["reason"] for row in rows.values() if row["status"] == FAILED} == {
        "no answer in 1 s"
    }
    without_compiling.clear()
    assert run(tmp_path, *arguments, "--sizes", "64,96,128") == 1
    assert {point.image_size for point in without_compiling} == {128}
    without_compiling.clear()
    assert run(tmp_path, *arguments, "--sizes", "64,96", "--retry") == 1
    assert [point.image_size for point in without_compiling] == [96] * 4
    text = (tmp_path / "compiled.md").read_text()
    assert "v5e:4x4, vit_b, 96 px, batch 1, data: no answer in 1 s" in text
    assert "| v5e-16 (4x4)" in text and "Estimates, not measurements" in text


def test_fit_marks_the_largest_and_uses_what_is_there(tmp_path, without_compiling):
    arguments = ("compiled", "--topologies", "v5e:2x2", "--encoders", "vit_t", "--sizes", "64")
    assert run(tmp_path, *arguments, "--fit") == 0
    rows = table.load(tmp_path, COMPILED)
    assert [row["batch"] for row in rows.values() if row["largest_that_fits"]] == [13]
    assert rows[Compiled("vit_t", 64, 14).key]["status"] == TOO_LARGE
    without_compiling.clear()
    assert run(tmp_path, *arguments, "--fit") == 0 and not without_compiling
    assert "| 13 (most) |" in (tmp_path / "compiled.md").read_text()


def test_everything_is_made_again_from_the_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "compile_with", lambda limit: fake)
    save = Figure.savefig
    coarse = lambda *given, dpi, **options: save(*given, dpi=dpi / 4, **options)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", coarse)
    meshes = ("--meshes", "data,tensor2", "--batches", "1,4,16")
    run(tmp_path, "compiled", *SMALL, *meshes, "--topologies", "v5e:2x2,v5p:2x2x1,v5p:8x8x8")
    made = [path for path in tmp_path.iterdir() if path.suffix != ".csv"]
    assert {path.name for path in made} == {"compiled.md"} | {
        f"{stem}.png" for stem in render.CHARTS["compiled"]
    }
    before = {path.name: path.read_bytes() for path in made}
    for path in made:
        path.unlink()
    assert program.main(["render", str(tmp_path)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    rows = table.load(tmp_path, COMPILED)
    row = rows[Compiled("vit_t", 64, 4, topology="v5p:8x8x8").key]
    assert row["estimate_efficiency"] == pytest.approx(512**0.9 / 512 / (4**0.9 / 4))


@pytest.mark.slow
def test_measured_on_two_simulated_devices(tmp_path, capsys):
    """The real step in a process with two devices; the words of a simulation."""
    arguments = ("measured", "--simulate", "2", "--devices", "2", *SMALL, "--steps", "3")
    arguments += ("--scaling", "weak")
    assert run(tmp_path, *arguments) == 0
    (row,) = table.load(tmp_path, MEASURED).values()
    assert row["status"] == OK and row["steps"] == 3 and row["compile_seconds"] > 0
    assert (row["devices"], row["data"], row["global_batch"]) == (2, 2, 2)
    assert row["first_quartile_seconds"] <= row["median_seconds"] <= row["third_quartile_seconds"]
    assert row["images_per_second"] * row["median_seconds"] == pytest.approx(2)
    assert row["mfu"] is None and row["peak_bytes"] > 1e8 and row["efficiency"] == 1
    text = (tmp_path / "measured.md").read_text()
    assert "simulation: 2 devices share these cores; says nothing about speed-up" in text
    assert (tmp_path / "measured.png").is_file()
    capsys.readouterr()
    assert run(tmp_path, *arguments) == 0
    assert "weak" not in capsys.readouterr().out.splitlines()[0]  # nothing was run again


def test_efficiency_is_against_the_fewest_devices():
    """Weakly at the same batch of a device, strongly at the same global batch."""
    rows = [
        dataclasses.asdict(Measured(batch=batch, scaling=scaling, devices=n))
        | {"status": OK, "device": "x", "global_batch": n * batch, "images_per_second": rate}
        for scaling, n, batch, rate in (
            ("weak", 4, 2, 32.0), ("weak", 2, 2, 20.0), ("strong", 2, 4, 8.0), ("strong", 4, 2, 8.0)
        )
    ]  # fmt: skip
    MEASURED.complete(rows)
    assert [row["efficiency"] for row in rows] == [0.8, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compiled", "--topologies", "v5e"], "not a chip and a shape"),
        (["compiled", "--meshes", "pipeline"], "mesh 'pipeline' unknown"),
        (["compiled", "--meshes", "fsdp+tensor"], "several axes"),
        (["compiled", "--batches", "0"], "must be 1 or more"),
        (["compiled", "--limit", "0"], "--limit"),
        (["measured", "--steps", "0"], "--steps"),
    ],
)
def test_mistakes_are_sentences(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "new", *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_and_a_broken_file_are_sentences(tmp_path):
    with pytest.raises(UserError, match=r"has no measured\.csv or compiled\.csv"):
        render.render_all(tmp_path)
    (tmp_path / "compiled.csv").write_text("encoder\nvit_b\n")
    with pytest.raises(UserError, match="cannot be read"):
        table.load(tmp_path, COMPILED)


def test_points_go_to_a_process_as_they_are():
    for point in (Compiled(mesh="fsdp8", batch=3), Measured(devices=2, scaling="strong")):
        assert type(point)(**json.loads(json.dumps(dataclasses.asdict(point)))) == point
