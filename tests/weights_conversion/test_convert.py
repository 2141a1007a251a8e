"""`python -m weights_conversion.convert`: files written, every refusal, and a full-size vit_b."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pgpsam_jax.models.sam.weights import TrainedFor, load_base
from pgpsam_jax.utils.files import file_digest
from tests.reference.sam_official import SMALL, VIT_B, assert_equal, random_state, save_pth
from tests.support.optional import torch
from tests.support.places import REPOSITORY
from weights_conversion import checkpoint_files
from weights_conversion import convert as program
from weights_conversion.sam import from_official, to_huggingface, to_official


@pytest.fixture(scope="module")
def state():
    return random_state(SMALL)


@pytest.fixture(scope="module")
def ours(state):
    return from_official(state)


def run(capsys, *arguments) -> str:
    program.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def fail(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        run(capsys, *arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


def test_pth_round_trip_and_sidecar(capsys, state, ours, tmp_path):
    source = save_pth(tmp_path / "small.v2.pth", state)
    printed = run(capsys, "--source", source, "--output", tmp_path / "w" / "small.v2")
    assert "314" not in printed and "custom, 16 px, patch 4" in printed
    weights, sidecar = (tmp_path / "w" / f"small.v2.{end}" for end in ("safetensors", "json"))
    assert_equal(load_file(weights), ours)
    assert [p.stat().st_mode & 0o777 for p in (weights, sidecar)] == [0o644, 0o644]
    assert json.loads(sidecar.read_text()) == {
        "format": "pgpsam_jax SAM weights",
        "format_version": 1,
        "variant": "custom",
        "image_size": 16,
        "patch_size": 4,
        "colors": "normalized",
        "mask_tokens": [0, 1, 2, 3],
        "layout": "official",
        "source": "small.v2.pth",
        "source_sha256": file_digest(source),
        "source_md5": file_digest(source, "md5"),
        "official_file": None,
        "sha256": file_digest(weights),
        "tensor_count": len(ours),
        "parameter_count": sum(array.size for array in state.values()),
        "casts": [],
    }
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == [sidecar.name, weights.name]
    for end in ("pth", "safetensors"):
        back = tmp_path / f"back.{end}"
        options = ("--reverse", "--layout", "official")
        run(capsys, *options, "--source", tmp_path / "w" / "small.v2", "--output", back)
        if end == "pth":
            found = {n: t.numpy() for n, t in torch.load(back, weights_only=True).items()}
        else:
            found = load_file(back)
        assert_equal(found, state)


def test_weights_that_were_trained_further(capsys, state, tmp_path):
    """MedSAM has the names and shapes of SAM; what it was trained on only its user can say."""
    source = save_pth(tmp_path / "medsam.pth", state)
    command = ("--source", source, "--output", tmp_path / "medsam", "--mask-tokens", 0)
    printed = run(capsys, *command, "--colors", "unit")
    assert "unit colors, mask tokens 0," in printed
    assert TrainedFor.of(tmp_path / "medsam") == TrainedFor(None, 4, "unit", (0,))
    command = ("--kind", "resnet18", *command)
    assert "go with --kind sam" in fail(capsys, *command)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_types_are_cast_and_noted(state, dtype, tmp_path):
    name = "image_encoder.neck.1.bias"
    tensors = {n: torch.from_numpy(a) for n, a in state.items()}
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    torch.save(tensors, tmp_path / "a.pth")
    meta = program.convert(tmp_path / "a.pth", tmp_path / "a", log=lambda line: None)
    assert meta["casts"] == [{"tensor": name, "from": dtype}]
    found = load_base(tmp_path / "a").tensors["image_encoder/neck/norm1/bias"]
    np.testing.assert_array_equal(found, tensors[name].float().numpy())
    assert found.dtype == np.float32


def test_content_decides_not_the_suffix(state, ours, tmp_path):
    save_file(state, tmp_path / "a.pth")
    save_pth(tmp_path / "b.safetensors", to_huggingface(ours))
    for source, layout in (("a.pth", "official"), ("b.safetensors", "huggingface")):
        meta = program.convert(tmp_path / source, tmp_path / "w", log=lambda line: None)
        assert meta["layout"] == layout
        assert_equal(load_base(tmp_path / "w").tensors, ours)


def test_md5_of_official_names(capsys, state, tmp_path, monkeypatch):
    source = save_pth(tmp_path / "sam_vit_l_0b3195.pth", state)
    arguments = ("--source", source, "--output", tmp_path / "w")
    message = fail(capsys, *arguments)
    assert "0b3195507c641ddb6910d2bb5adee89c" in message and file_digest(source, "md5") in message
    assert "damaged or it is another file" in message and "--allow-unknown-md5" in message
    assert not (tmp_path / "w.safetensors").exists()
    assert "warning" in run(capsys, *arguments, "--allow-unknown-md5")
    assert json.loads((tmp_path / "w.json").read_text())["official_file"] is None
    # A file that has the published MD5, under its own or another name.
    official = program.OFFICIAL["vit_l"]._replace(md5=file_digest(source, "md5"))
    monkeypatch.setitem(program.OFFICIAL, "vit_l", official)
    for path in (source, source.rename(tmp_path / "renamed.pth")):
        meta = program.convert(path if path.exists() else tmp_path / "renamed.pth", tmp_path / "w")
        assert meta["official_file"] == "sam_vit_l_0b3195.pth"


def test_published_digests_begin_as_the_file_names_say():
    for variant, file in program.OFFICIAL.items():
        assert file.file == f"sam_{variant}_{file.md5[:6]}.pth" and len(file.md5) == 32


def test_missing_source_says_where_to_get_it(capsys, tmp_path):
    message = fail(capsys, "--source", "sam_vit_h_4b8939.pth", "--output", tmp_path / "my weights")
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth" in message
    assert (
        f"pgpsam convert --source sam_vit_h_4b8939.pth --output '{tmp_path}/my weights'" in message
    )
    assert "holds no model.safetensors" in fail(capsys, "--source", tmp_path, "--output", "w")


def test_damaged_and_foreign_sources(capsys, state, ours, tmp_path):
    output = tmp_path / "w"
    source = save_pth(tmp_path / "a.pth", state)
    source.write_bytes(source.read_bytes()[:-1000])
    assert "damaged or incomplete" in fail(capsys, "--source", source, "--output", output)
    save_file(state, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    lies = (
        content[:-100],
        content + b"1",
        (1 << 60).to_bytes(8, "little") + content[8:],
        content[:8] + content[8 : 8 + header].replace(b"[0,", b"[9,", 1) + content[8 + header :],
    )
    for lie in lies:
        (tmp_path / "a.safetensors").write_bytes(lie)
        message = fail(capsys, "--source", tmp_path / "a.safetensors", "--output", output)
        assert "not a complete safetensors file" in message
    save_file(ours, tmp_path / "c.safetensors")
    message = fail(capsys, "--source", tmp_path / "c.safetensors", "--output", output)
    assert "already in this project's layout" in message
    save_file(state, tmp_path / "w.safetensors")
    message = fail(capsys, "--source", tmp_path / "w.safetensors", "--output", output)
    assert "would overwrite the source" in message
    assert not (tmp_path / "w.json").exists()


def test_failed_write_leaves_the_old_files(capsys, state, tmp_path, monkeypatch):
    source = save_pth(tmp_path / "a.pth", state)
    run(capsys, "--source", source, "--output", tmp_path / "out" / "w")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full_disk(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_file", full_disk)
    message = fail(capsys, "--source", source, "--output", tmp_path / "out" / "w")
    assert "cannot be written" in message and "No space left" in message
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_reverse_mistakes(capsys, state, tmp_path, monkeypatch):
    source = save_pth(tmp_path / "a.pth", state)
    weights = tmp_path / "w"
    run(capsys, "--source", source, "--output", weights)
    options = ("--reverse", "--layout", "official", "--source")
    message = fail(capsys, *options, weights, "--output", tmp_path / "b.bin")
    assert "should end in .pth or .safetensors" in message
    message = fail(capsys, *options, weights, "--output", tmp_path / "w.safetensors")
    assert "would overwrite the source" in message
    assert "dl.fbaipublicfiles.com" in fail(
        capsys, *options, tmp_path / "none", "--output", tmp_path / "b.pth"
    )
    monkeypatch.setitem(sys.modules, "torch", None)
    message = fail(capsys, *options, weights, "--output", tmp_path / "b.pth")
    assert "pip install '.[convert]'" in message
    assert not list(tmp_path.glob("*b.*"))
    for half in (["--reverse"], ["--layout", "official"]):
        with pytest.raises(SystemExit):
            program.main([*half, "--source", "a", "--output", "b"])
        assert "--reverse and --layout go together" in capsys.readouterr().err


MEASURED = """
import sys
from weights_conversion.convert import main
main(sys.argv[1:])
assert "torch" not in sys.modules and "jax" not in sys.modules
lines = open("/proc/self/status") if sys.platform == "linux" else ["VmHWM: 0 kB"]
print(next(line for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (SMALL, "tensors, "),
        pytest.param(
            VIT_B,
            "vit_b, 1024 px, patch 16, normalized colors, mask tokens 0, 1, 2, 3, 293 tensors, "
            "93,735,728 parameters",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["small", "vit_b"],
)
def test_a_process_without_torch(sizes, said, tmp_path):
    """A whole vit_b `.pth`, too, within 1.5 GiB."""
    state = random_state(sizes)
    source = save_pth(tmp_path / "full.pth", state)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "--source", source, "--output", tmp_path / "w"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert int(done.stdout.split("VmHWM:")[1].split()[0]) < 1.5 * 2**20  # kB
    assert_equal(to_official(load_base(tmp_path / "w").tensors), state)


def test_weights_of_others_are_kept(capsys, state, tmp_path):
    source = save_pth(tmp_path / "a.pth", state)
    arguments = ["--source", source, "--output", tmp_path / "w"]
    run(capsys, *arguments)
    run(capsys, *arguments)  # the same again is no loss
    back = ["--reverse", "--layout", "official", "--source", tmp_path / "w", "--output"]
    for command, kept in (
        (arguments, tmp_path / "w.safetensors"),
        (arguments, tmp_path / "w.json"),
        ([*back, tmp_path / "back.safetensors"], tmp_path / "back.safetensors"),
    ):
        run(capsys, *command)
        kept.write_text("{}")
        assert f"{kept} exists" in fail(capsys, *command)
        assert kept.read_text() == "{}"
        run(capsys, *command, "--overwrite")
        assert kept.read_text(errors="replace") != "{}"
