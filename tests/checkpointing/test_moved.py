"""A run whose folder, data and repository moved, and one that is to take more steps."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pgpsam_jax
from pgpsam_jax.checkpointing import identity, locations, resumption
from pgpsam_jax.config import serialization
from pgpsam_jax.data import dataset
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.inference import trained_run
from pgpsam_jax.methods import build
from pgpsam_jax.models.sam import weights
from pgpsam_jax.report.figures import scored_volumes
from pgpsam_jax.results.runs import read_run
from pgpsam_jax.training import train
from pgpsam_jax.utils.files import file_digest, write_json
from tests.support import kept_steps, tiny_method
from tests.support.faults import NOISE, TINY, newest, records
from tests.support.small_run import config_for, write_data


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with tiny_method.known(), kept_steps.kept():
        yield


def settings_for(data="data", **settings):
    own = {"model__train_encoder": "full", "log__checkpoint_steps": 9}  # the last is saved anyway
    return config_for(Path(data), **TINY | NOISE | own | settings)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with data and a run, which was made from there with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    write_data(folder / "data", cases=("a", "b", "c", "d"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        summary = train.train(settings_for(), "runs/x")
    write_json(folder / "summary.json", summary)
    return folder


@pytest.fixture
def moved(project, tmp_path, monkeypatch):
    """The project in another folder, and the old one as good as gone; we are in a third."""
    shutil.copytree(project, tmp_path / "moved")
    project.rename(project.with_name("gone"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "moved"
    project.with_name("gone").rename(project)


def evaluate(workdir, settings=None, **fields):
    """`--mode evaluate`, with a configuration or with fields of the run's own."""
    if fields:
        settings = serialization.load_config(workdir)
        for name, value in fields.items():
            section, field = name.split("__")
            settings[section][field] = str(value)
    return workdirs.evaluate_workdir(workdir, settings)


def test_everything_moved_together(project, moved):
    workdir, summary = moved / "runs" / "x", json.loads((moved / "summary.json").read_text())
    assert evaluate(workdir) == summary
    assert evaluate(workdir, settings_for()) == summary  # as on the old command line
    assert train.train(settings_for(), workdir) == summary
    assert set(scored_volumes.TestSet(read_run(workdir)).cases) == {"d"}
    assert pgpsam_jax.load_run(workdir).segment(moved / "data/images/d.nii.gz").shape
    assert (workdir / "config.json").read_text() == json.dumps(
        json.loads((workdir / "config.json").read_text()), indent=2
    ) + "\n"


def test_the_data_alone_moved(project, moved, tmp_path, monkeypatch):
    workdir, summary = moved / "runs" / "x", json.loads((moved / "summary.json").read_text())
    data = (moved / "data").rename(tmp_path / "data set")
    said = r"the data of .* are not at data or .*; give --config.data.root=FOLDER"
    with pytest.raises(UserError, match=said):
        evaluate(workdir)
    with pytest.raises(UserError, match=r"are not at .*; give --data=FOLDER"):
        scored_volumes.TestSet(read_run(workdir))
    for name in ("table.json", "split.json"):  # the workdir has copies
        (data / name).unlink()
    assert evaluate(workdir, data__root=data) == summary
    assert evaluate(workdir, settings_for(data__root=str(data))) == summary
    given = dict(data__root=str(data), train__steps=9)
    with monkeypatch.context() as patch:
        patch.setattr(workdirs, "run_evaluation", lambda *_: {})
        train.train(settings_for(**given), workdir)
    assert evaluate(workdir)["n_cases"] == 1  # from here on the run knows
    assert newest(workdir) == 9


def test_an_unrelated_folder_of_the_same_name(project, moved):
    """What lies under the old names here is not the run's: label tables and splits by content."""
    write_data(Path("data"), cases=("a", "b", "c", "d"))
    table = json.loads(Path("data/table.json").read_text())
    table["classes"].reverse()
    Path("data/table.json").write_text(json.dumps(table))
    Path("data/split.json").write_text(json.dumps({"train": ["d"], "test": ["a", "b", "c"]}))
    found = locations.resolve_paths(serialization.load_config(moved / "runs/x"), moved / "runs/x")
    assert Path(found.data.label_table) == moved / "data/table.json"
    assert Path(found.data.split_file) == moved / "runs/x/split.json"
    for name in ("table.json", "split.json"):
        (moved / "data" / name).unlink()
    with pytest.raises(UserError, match=r"label_table\) has other classes .*labels.json"):
        evaluate(moved / "runs/x")
    Path("data/table.json").unlink()
    with pytest.raises(UserError, match=r"the split has changed .*a: train then, test now"):
        evaluate(moved / "runs/x")


@pytest.fixture
def run(project, tmp_path, monkeypatch):
    """(workdir, data) of a copy of the run, whose data are where they were."""
    monkeypatch.chdir(project)
    shutil.copytree(project, tmp_path / "copy")
    return tmp_path / "copy" / "runs" / "x", tmp_path / "copy" / "data"


def test_a_file_renamed_is_the_same_and_one_edited_is_not(run, tmp_path):
    workdir, data = run
    table = json.loads((data / "table.json").read_text())
    for entry in table["classes"]:
        entry["source"] = list(entry["source"])
    paths = {name: tmp_path / f"my {name}.json" for name in ("table", "split", "list")}
    paths["table"].write_text(json.dumps(table, indent=7))
    split = json.loads((data / "split.json").read_text())
    paths["split"].write_text(json.dumps({"test": split["test"], "train": split["train"][::-1]}))
    shutil.copy(workdir / "fewshot.txt", paths["list"])
    here = settings_for(
        data__label_table=str(paths["table"]),
        data__split_file=str(paths["split"]),
        fewshot__file=str(paths["list"]),
        fewshot__count=None,
    )
    evaluate(workdir, here)
    train.train(here, workdir)
    paths["table"].write_text(json.dumps(table).replace("liver", "lever"))
    for begin in (evaluate, lambda workdir, settings: train.train(settings, workdir)):
        with pytest.raises(UserError, match=r"my table.json \(data.label_table\) has other"):
            begin(workdir, here)
    paths["table"].unlink()
    lines = paths["list"].read_text().splitlines()
    paths["list"].write_text("\n".join(line for line in lines[:-1] if "hash" not in line))
    with pytest.raises(UserError, match=r"my list.json \(fewshot.file\) has other slices"):
        train.train(here, workdir)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"train": ["b", "c", "d"], "test": ["a"]}, "a: train then, test now; d: test then, train"),
        ({"train": ["a", "b"], "test": ["d"]}, "c: train then, in no part now"),
        ({"train": ["a", "b", "c", "e"], "test": ["d"]}, "e: in no part then, train now"),
        ({"train": ["a", "b"], "validation": ["c"], "test": ["d"]}, "c: train then, validation"),
    ],
)
def test_a_split_that_changed_is_told_by_case(run, edit, said, tmp_path):
    workdir, data = run
    for kind in ("images", "labels"):
        shutil.copy(data / kind / "a.nii.gz", data / kind / "e.nii.gz")
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(edit))
    before = {p: p.read_bytes() for p in workdir.glob("*.json")}
    settings = settings_for(data, data__split_file=str(path), data__verify=False)
    for begin in (evaluate, lambda workdir, settings: train.train(settings, workdir)):
        with pytest.raises(UserError, match=f"split has changed since the run in .*{said}"):
            begin(workdir, settings)
    assert before == {p: p.read_bytes() for p in workdir.glob("*.json")}


def test_another_way_to_the_same_split(run):
    workdir, data = run
    settings = settings_for(data, data__split="fraction", data__split_file="", data__axis="axial")
    for seed in range(9):  # which of them draws our split is chance
        settings.data.split_seed, settings.data.test_fraction = seed, 0.25
        same = [case.case_id for case in dataset.find_split(settings.data).test] == ["d"]
        stored = serialization.load_config(workdir)
        found = build.resolve_method_defaults(locations.resolve_paths(settings, workdir))
        identity.check_same(stored, found, workdir)
        if same:
            resumption.check_split(workdir, dataset.find_split(found.data))
        else:
            with pytest.raises(UserError, match="the split has changed"):
                resumption.check_split(workdir, dataset.find_split(found.data))
    settings.data.split = "within_volume"
    with pytest.raises(UserError, match=r"data.split: 'file' there, 'within_volume' now"):
        identity.check_same(stored, settings, workdir)


def test_a_run_split_by_person_keeps_its_groups(run, tmp_path):
    """Its file may be gone, but one that lacks a case is told of."""
    (_, data), workdir, file = run, tmp_path / "grouped", tmp_path / "persons.csv"
    file.write_text("case,group\na,p\nb,p\nc,q\nd,r\ne,s\n")  # of one case more than there is
    own = {"data__split": "group", "data__split_file": "", "data__test_fraction": 0.34}
    settings = settings_for(data, **own, data__group_file=str(file), fewshot__count=3)
    summary = train.train(settings, workdir)
    wanted = {"a": "p", "b": "p", "c": "q", "d": "r"}
    assert json.loads((workdir / "groups.json").read_text()) == read_run(workdir).groups == wanted
    tested = json.loads((workdir / "split.json").read_text())["test"]
    assert summary["n_groups"] == 1 and summary["n_cases"] == len(tested)
    assert evaluate(workdir) == evaluate(workdir, settings) == summary
    file.unlink()
    assert evaluate(workdir) == summary  # by the workdir's copy
    file.write_text("case,group\na,p\n")
    with pytest.raises(UserError, match=r"does not name the case\(s\) b, c, d"):
        evaluate(workdir, settings)


def test_other_images_are_scored_with_a_word(run):
    workdir, data = run
    shutil.copy(data / "images" / "a.nii.gz", data / "images" / "d.nii.gz")
    summary = evaluate(workdir, data__root=data)
    assert any("test images have changed" in notice for notice in summary["notices"])
    with pytest.raises(UserError, match="images of the test cases has changed"):
        train.train(settings_for(data, data__verify=False), workdir)


def test_a_workdir_of_before_has_no_records(run):
    """No split, no places, no digest of the test images: the same settings go on and evaluate."""
    workdir, data = run
    origin = json.loads((workdir / "provenance.json").read_text())
    del origin["test"]
    write_json(workdir / "provenance.json", origin)
    for name in ("split.json", "places.json"):
        (workdir / name).unlink()
    summary = evaluate(workdir)
    with pytest.raises(UserError, match=r"data.split_file: .* there, .* now"):
        train.train(settings_for(data), workdir)
    assert train.train(settings_for(), workdir) == summary
    assert (workdir / "split.json").is_file() and (workdir / "places.json").is_file()


@pytest.fixture
def longer(project, monkeypatch):
    """Trains, from the project's folder, to a number of steps; nothing is evaluated."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(workdirs, "run_evaluation", lambda *_: {})
    return lambda run, steps, **settings: train.train(
        settings_for(train__steps=steps, **settings), run
    )


def test_a_finished_run_takes_more_steps(run, longer, capsys):
    (workdir, _), before = run, records(run[0])
    longer(workdir, 9)
    said = capsys.readouterr().out
    assert (
        "the run of 6 steps resumes from step 6 and continues to step 9; its learning rates so far"
        in said
    )
    assert "resumed from step 6" in said
    assert records(workdir)[:6] == before and newest(workdir) == 9
    assert serialization.load_config(workdir).train.steps == 9
    assert json.loads((workdir / "cost.json").read_text())["timed_from"] == 0
    longer(workdir, 0, train__epochs=10)  # of 7 slices in batches of 8: as many steps
    assert "resumes from step" not in capsys.readouterr().out
    assert newest(workdir) == 9 and serialization.load_config(workdir).train.epochs == 10
    with pytest.raises(UserError, match=r"a run of 9 steps, 9 of them done: .* shortened to 7;"):
        longer(workdir, 7)
    assert evaluate(workdir, settings_for(train__steps=3)) == {}  # it trains nothing


@pytest.mark.slow
def test_a_constant_rate_makes_it_one_longer_run(longer, tmp_path, capsys):
    constant = {"optim__decay": "constant", "optim__warmup_fraction": 0.0}
    for workdir, lengths in ((tmp_path / "one", [5]), (tmp_path / "two", [2, 5])):
        for steps in lengths:
            longer(workdir, steps, **constant)
    said = capsys.readouterr().out
    assert "the run of 2 steps resumes from step 2 and continues to step 5\n" in said
    assert records(tmp_path / "one") == records(tmp_path / "two")


def a_base(stem, seed):
    """A file that passes for a converted SAM, until it is loaded."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.full(3, seed, np.float32)}, f"{stem}.safetensors")
    sidecar = {"format": weights.FORMAT, "format_version": weights.FORMAT_VERSION}
    write_json(f"{stem}.json", sidecar | {"sha256": file_digest(f"{stem}.safetensors")})
    return weights.recorded_digest(stem)


def places_of(config, workdir, _):
    return locations.find_base(config, workdir)


def test_the_converted_sam_is_found_by_content(tmp_path, monkeypatch):
    workdir, settings = tmp_path / "p" / "run", settings_for(model__base="weights/sam")
    wanted = a_base(tmp_path / "p" / "weights" / "sam", 1)
    workdir.mkdir()
    monkeypatch.chdir(tmp_path / "p")
    serialization.save_config(settings, workdir)
    write_json(workdir / "base.json", {"base": "weights/sam", "sha256": wanted})
    locations.record_locations(workdir, settings)
    (tmp_path / "p").rename(tmp_path / "q")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    workdir = tmp_path / "q" / "run"
    assert Path(locations.find_base(settings, workdir)) == tmp_path / "q" / "weights" / "sam"
    other = a_base(Path("weights/sam"), 2)  # another of the same name
    assert Path(locations.find_base(settings, workdir)) == tmp_path / "q" / "weights" / "sam"
    (tmp_path / "q" / "weights").rename(tmp_path / "my weights")
    with pytest.raises(
        UserError, match=rf"SHA-256 {wanted}, but weights/sam has {other}; .*--base"
    ):
        locations.find_base(settings, workdir)
    shutil.rmtree("weights")
    said = rf"with SHA-256 {wanted}, are not at weights/sam or .*; name those with --base STEM"
    with pytest.raises(UserError, match=said):
        locations.find_base(settings, workdir)
    write_json(workdir / "labels.json", {"classes": [{"name": "liver", "source": [1]}]})
    with pytest.raises(UserError, match=said):
        pgpsam_jax.load_run(workdir)
    settings.model.base = str(tmp_path / "my weights" / "sam")
    assert locations.find_base(settings, workdir) == settings.model.base
    monkeypatch.setattr(trained_run, "load_predictor", places_of)
    run = pgpsam_jax.load_run(workdir, base=tmp_path / "my weights" / "sam")
    assert run.predictor == settings.model.base


def test_a_path_is_no_identity(tmp_path):
    root = write_data(tmp_path / "one")
    shutil.copytree(root, tmp_path / "two")
    settings = [config_for(folder) for folder in (root, tmp_path / "two")]
    ours, theirs = map(identity.fingerprint, settings)
    assert ours == theirs
    for field, text in {
        "table": (tmp_path / "two/table.json").read_text().replace("liver", "lever"),
        "split": json.dumps({"train": ["a"], "test": ["b", "c"]}),
    }.items():
        path = tmp_path / "two" / f"{field}.json"
        before = path.read_text()
        path.write_text(text)
        assert identity.fingerprint(settings[1]) != ours
        path.write_text(before)
    settings[1].model.base = str(tmp_path / "sam")
    a_base(tmp_path / "sam", 1)
    first = identity.fingerprint(settings[1])
    a_base(tmp_path / "sam", 2)
    assert len({ours, first, identity.fingerprint(settings[1])}) == 3
