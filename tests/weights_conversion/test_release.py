"""Checkpoints of the authors' release to workdirs and back: bits, settings, mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
import types

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from pgpsam_jax.config import serialization
from pgpsam_jax.data.dataset import label_table
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.methods import build
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.utils.files import file_digest, write_json
from tests.reference.release_state import RANK, SMALL, VIT_B, release_shapes, release_state
from tests.reference.sam_official import assert_equal, save_pth
from tests.support.optional import torch
from tests.support.places import REPOSITORY
from tests.support.small_run import config_for, write_data
from weights_conversion import convert as program
from weights_conversion import release
from weights_conversion.remap import read

DEAD = ("cross_attn_token_to_image.alpha", "cross_attn_token_to_image.beta", "mask_norm")
DEAD += ("cross_attn_token_to_image.linear", "mask_proj1", "mask_proj2")
SETTINGS = dict(
    model__encoder="vit_t",  # commands know no encoder of the tests
    model__preset="release",
    model__train_encoder="lora",
    model__lora_rank=RANK,
    eval__overlays=False,
)


@pytest.fixture(scope="module")
def state():
    return release_state(SMALL)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(root):
    """Path of a config file for three classes and the encoder vit_t."""
    path = root / "release.py"
    path.write_text(
        "from pathlib import Path\nfrom tests.support.small_run import config_for\n"
        f"def get_config():\n    return config_for(Path({str(root)!r}), **{SETTINGS!r})\n"
    )
    return path


@pytest.fixture(scope="module")
def source(state, tmp_path_factory):
    """A `.pth` as a training script writes it under DataParallel."""
    path = tmp_path_factory.mktemp("source") / "best_ckpt.pth"
    named = {f"module.{name}": torch.from_numpy(array) for name, array in state.items()}
    torch.save({"epoch": 7, "model": named, "optimizer": {"param_groups": []}}, path)
    return path


@pytest.fixture(scope="module")
def workdir(source, config, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "converted"
    program.main(arguments(source, output, f"--config={config}", "--config.seed=3"))
    return output


def arguments(source, output, *more) -> list[str]:
    options = ["--kind", "pgpsam_release", "--source", source, "--output", output, *more]
    return [str(option) for option in options]


def fail(capsys, *options) -> str:
    with pytest.raises(SystemExit) as caught:
        program.main(arguments(*options))
    assert caught.value.code == 2
    return capsys.readouterr().err


def tensors_of(path) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in torch.load(path, weights_only=True).items()}


def test_what_a_converted_workdir_holds(workdir, source, state):
    names = ("base.json", "checkpoints", "config.json", "frozen.safetensors", "labels.json")
    names += ("provenance.json", "unused.safetensors")
    assert tuple(sorted(path.name for path in workdir.iterdir())) == names
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["7"]
    digest = file_digest(workdir / "frozen.safetensors")
    settled = {"base": source.name, "sha256": None, "frozen": digest}
    assert json.loads((workdir / "base.json").read_text()) == settled
    record = json.loads((workdir / "provenance.json").read_text())
    assert record["source"] == source.name and record["source_sha256"] == file_digest(source)
    assert record["source_epoch"] == 7
    config = serialization.load_config(workdir)
    assert (config.model.preset, config.model.base, config.seed) == ("release", "", 3)
    names = load_label_table(workdir / "labels.json").names
    assert names == ("background", "liver", "spleen")
    frozen, unused = (load_file(workdir / f"{name}.safetensors") for name in ("frozen", "unused"))
    ours = read(release.RELEASE, state)
    assert_equal(unused, {name: array for name, array in ours.items() if name[:7] == "unused/"})
    encoder = {
        n: a for n, a in ours.items() if n.startswith("image_encoder/") and "/lora/" not in n
    }
    assert_equal(frozen, encoder)
    assert workdir.stat().st_mode & 0o777 == 0o755


def test_round_trip_is_exact_and_in_order(workdir, state, tmp_path):
    """Out again through the loading code: frozen and trained weights of the model itself."""
    program.main(arguments(workdir, tmp_path / "back.pth", "--reverse"))
    back = tensors_of(tmp_path / "back.pth")
    assert list(back) == list(state)
    assert_equal(back, state)


@pytest.fixture
def evaluated(workdir, tmp_path):
    """A copy, to which evaluation may add."""
    return shutil.copytree(workdir, tmp_path / "run")


@pytest.mark.slow  # the way back loads it, too
def test_a_converted_workdir_is_ready_to_be_evaluated(evaluated, state, monkeypatch):
    """All that goes before the compiled program, with the weights that it gets."""
    given = []
    monkeypatch.setattr(workdirs, "run_evaluation", lambda *arguments: given.extend(arguments))
    workdirs.evaluate_workdir(evaluated)
    config, folder, predictor, split = given
    assert (config.model.preset, folder) == ("release", evaluated)
    assert [case.case_id for case in split.test] == ["c"]
    ours = {n: a for n, a in read(release.RELEASE, state).items() if not n.startswith("unused/")}
    leaves = flat_paths(nnx.state(predictor.model))
    assert_equal({name: np.asarray(leaf[...]) for name, leaf in leaves.items()}, ours)


@pytest.mark.slow
def test_a_converted_workdir_is_evaluated(evaluated, root):
    summary = workdirs.evaluate_workdir(evaluated)
    assert (evaluated / "evaluation" / "cases.csv").is_file() and summary
    mask = nib.load(evaluated / "evaluation" / "predictions" / "c.nii.gz")
    assert mask.shape == nib.load(root / "images" / "c.nii.gz").shape
    assert len(np.unique(np.asarray(mask.dataobj))) > 1


@pytest.mark.parametrize("kind", ["bare", "module", "model", "state_dict", "safetensors"])
def test_files_that_hold_the_state(kind, state, tmp_path):
    source, named = tmp_path / "a.pth", {n: torch.from_numpy(a) for n, a in state.items()}
    if kind == "module":
        torch.save({f"module.{name}": tensor for name, tensor in named.items()}, source)
    elif kind == "safetensors":
        save_file(state, source)
    else:
        beside = {"epoch": 12 if kind == "model" else "last", "best_dice": 0.8, "lr": [1e-3]}
        torch.save(named if kind == "bare" else {kind: named, **beside}, source)
    tensors, epoch = release.read_release(source)
    assert_equal(tensors, state)
    assert epoch == (12 if kind == "model" else None)


def test_a_run_of_ours_goes_out(root, tmp_path, monkeypatch, capsys):
    """One that trained the whole encoder: without LoRA, and without what the release has idle.

    Loading it is loading any run.
    """
    settings = config_for(root, **SETTINGS | {"model__train_encoder": "full"})
    table, workdir = label_table(settings.data), tmp_path / "full"
    graphdef, params, frozen = build.abstract_model(settings.model, table.num_classes)
    rng = np.random.default_rng(2)
    for leaf in (flat_paths(params) | flat_paths(frozen)).values():
        leaf.set_value(jnp.asarray(rng.random(leaf.shape, np.float32)))
    serialization.save_config(settings, workdir)
    run = types.SimpleNamespace(model=nnx.merge(graphdef, params, frozen))
    monkeypatch.setattr(release, "load_run", {workdir: run}.get)
    program.main(arguments(workdir, tmp_path / "a.safetensors", "--reverse"))
    printed = capsys.readouterr().out
    assert "zero LoRA of rank 5" in printed
    assert "14 tensors that affect no output" in printed
    tensors = load_file(tmp_path / "a.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == release_shapes(SMALL)
    for name, array in tensors.items():
        if any(part in name for part in (*DEAD, "lora_linear")):
            np.testing.assert_array_equal(array, float(name.endswith("mask_norm.weight")))
    ours = read(release.RELEASE, tensors)
    for path, leaf in flat_paths(params).items():
        np.testing.assert_array_equal(ours[path], leaf[...], err_msg=path)


def test_a_failed_conversion_leaves_nothing(source, config, tmp_path, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(release, "_states", lambda *_: ({}, {}))
    monkeypatch.setattr(release.frozen_weights, "pin_frozen_weights", full_disk)
    message = fail(capsys, source, tmp_path / "w", f"--config={config}")
    assert "cannot be written" in message and "No space left" in message
    assert list(tmp_path.iterdir()) == []


# Mistakes.


def test_all_problems_come_in_one_message(state, config, tmp_path, capsys):
    bad = dict(state)
    bad["mask_decoder.iou_token.weight"] = np.zeros((1, 64), np.float32)
    del bad["mask_decoder.output_hypernetworks_mlps.1.layers.2.bias"]
    del bad["pre_prompt.csm.mlp.1.conv.weight"]
    bad["mask_decoder.mask_proj1.weight"] = np.zeros((1, 4), np.float32)
    message = fail(capsys, save_pth(tmp_path / "x.pth", bad), tmp_path / "w", f"--config={config}")
    first, *lines = message.strip().splitlines()
    assert f"{tmp_path}/x.pth does not fit the release PGP-SAM layout in 4 places" in first
    assert sorted(line.strip() for line in lines) == [
        "missing: mask_decoder.output_hypernetworks_mlps.1.layers.2.bias",
        "missing: pre_prompt.csm.mlp.1.conv.weight",
        "unexpected: mask_decoder.iou_token.weight",
        "wrong shape: mask_decoder.mask_proj1.weight is (1, 4), expected (1, 3)",
    ]
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["model.preset=paper"], "it has model.preset paper, not release; change these"),
        (["model.train_encoder=full"], "model.train_encoder full, not lora"),
        (["model.dcn=plain"], "model.dcn plain, not deformable"),
        (["model.colors=normalized"], "model.colors normalized, not unit"),
        (["model.lora_rank=4", "model.image_size=64"], "image_size 64, not 32; .*lora_rank 4, not"),
        (["model.encoder=vit_b"], "width of model.encoder 768, not 96; depth of .* 12, not 4"),
        (["model.alpha=4", "model.k=2"], "model.alpha 4, not 8; model.k 2, not 4"),
        (["data.label_table=configs/labels/ventricles.json"], "classes in data.label_table 5, not"),
        (["model.lora_ranks=4"], "--config cannot be used: .*lora_ranks"),
        (["model.lora_rank=x"], "--config cannot be used: .*lora_rank"),
    ],
)
def test_settings_that_do_not_fit(flags, message, source, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    fields = [f"--config.{flag}" for flag in flags]
    found = fail(capsys, source, tmp_path / "w", f"--config={config}", *fields)
    assert re.search(message, found), found
    assert not (tmp_path / "w").exists()


def test_models_that_do_not_fit():
    needed = {"cfm/0/alpha": (4,), "cfm/1/alpha": (4,), "image_encoder/lora/a": (1, 4, 5)}
    given = {"cfm/0/alpha": (4,), "image_encoder/lora/a": (2, 4, 5), "image_level": (1, 4)}
    release.check_fit(needed, needed, "a.pth")
    with pytest.raises(UserError) as caught:
        release.check_fit(needed, given, "a.pth")
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("a.pth does not fit the model of --config in 3 places")
    assert [line.strip() for line in lines] == [
        "cfm/1/alpha is missing, expected (4,)",
        "image_encoder/lora/a is (2, 4, 5), expected (1, 4, 5)",
        "image_level is (1, 4), expected no such tensor",
    ]


def test_mistaken_paths(source, config, workdir, tmp_path, capsys):
    assert "already; choose another --output" in fail(capsys, source, workdir, f"--config={config}")
    assert "is not a file" in fail(capsys, tmp_path, tmp_path / "w")
    assert "should end in .pth" in fail(capsys, workdir, tmp_path / "a.bin", "--reverse")
    assert "is not a training workdir" in fail(capsys, tmp_path, tmp_path / "a.pth", "--reverse")
    assert "there is no default for that number" in fail(capsys, source, tmp_path / "w")


def test_runs_that_the_layout_cannot_hold(workdir, tmp_path, capsys):
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["model"]["colors"] == "unit"
    stored["model"] |= {"preset": "paper", "dcn": "plain", "lora_targets": ["q", "k"]}
    stored["model"]["colors"] = "normalized"
    write_json(tmp_path / "run" / "config.json", stored)
    message = fail(capsys, tmp_path / "run", tmp_path / "a.pth", "--reverse")
    assert "it has model.preset paper, not release; model.dcn plain, not deformable; " in message
    assert "model.colors normalized, not unit; " in message
    assert "model.lora_targets ('q', 'k'), not ('q', 'v')" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "pgpsam_release", "--layout", "official"], "go with --kind sam"),
        (["--kind", "pgpsam_release", "--allow-unknown-md5"], "go with --kind sam"),
        (["--kind", "pgpsam_release", "--reverse", "--config.seed=1"], "the workdir has its own"),
        (["--config=a.py"], "--config goes with --kind pgpsam_release"),
        (["--kind", "pgpsam_release", "--conf=a.py"], "unrecognized arguments: --conf=a.py"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    with pytest.raises(SystemExit):
        program.main(["--source", "a", "--output", "b", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("classes", [9, 5])
def test_default_configs(classes, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = release.config_of([], classes, "best_ckpt.pth")
    assert config.model.preset == "release"
    assert label_table(config.data).num_classes == classes


MEASURED = """
import sys
from weights_conversion.convert import main
main(sys.argv[1:])
lines = open("/proc/self/status") if sys.platform == "linux" else ["VmHWM: 0 kB"]
print(next(line for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_full_size_workdir(tmp_path):
    """The release's vit_b to a workdir and back, in processes of their own, within 2.5 GiB."""
    state = release_state(VIT_B)
    source, run, back = (tmp_path / name for name in ("best_ckpt.pth", "run", "back.pth"))
    save_pth(source, state)
    for options in (arguments(source, run), arguments(run, back, "--reverse")):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *options],
            cwd=REPOSITORY,
            env=os.environ | {"XLA_FLAGS": ""},  # eight devices would hold the weights eight times
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "770 tensors in the release layout" in done.stdout
        assert int(done.stdout.split("VmHWM:")[1].split()[0]) < 2.5 * 2**20  # kB
    found = tensors_of(back)
    assert list(found) == list(state)
    assert_equal(found, state)
