"""Patients and classes of any name: ids keep their letters, lists find them, texts stay literal."""

import html
import json
import os
import re
import unicodedata

import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax.data import cache, dataset, fewshot_list
from pgpsam_jax.data.io.nifti import write_label
from pgpsam_jax.data.io.volumes import read_image
from pgpsam_jax.data.layouts import find
from pgpsam_jax.data.layouts.cases import safe_case_id
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.outputs import LabeledVolume, score_and_write
from pgpsam_jax.report.html.markup import escape, link
from pgpsam_jax.utils.files import atomic_path, write_text
from pgpsam_jax.utils.markdown import escape_cell
from pgpsam_jax.visualization import overlays
from tests.support.layout_data import write_transunet
from tests.support.small_run import config_for, few_shot_data, write_data

NAMES = ["Müller", "pat 1", "病例" * 40, "日本語", "محمد", "हिन्दी", "a$b$ <c>", 'x|y, "q"']
GLOBS = ("images/*.nii.gz", "labels/*.nii.gz")


def decompose(folder, name="Müller"):
    other = unicodedata.normalize("NFD", name)
    os.rename(folder / f"{name}.nii.gz", folder / f"{other}.nii.gz")
    return other


def test_from_files_to_scores_under_any_name(tmp_path):
    """Labels decomposed, as macOS writes them; split and list name patients as files do."""
    root = write_data(tmp_path, NAMES)
    other = decompose(root / "labels")
    split = {"train": [other, *NAMES[1:4]], "test": NAMES[4:]}
    (root / "split.json").write_text(json.dumps(split))
    (root / "list.txt").write_text(f"{other}\t4\n" + "".join(f"{n}\t5\n" for n in NAMES[1:4]))
    config = config_for(root, data__axis="axial", fewshot__file=str(root / "list.txt"))
    found = dataset.find_split(config.data)
    ids = [safe_case_id(name) for name in NAMES]
    assert [case.case_id for case in found.train + found.test] == ids
    assert ids[:2] == ["Müller", "pat_1"] and ids[3:6] == NAMES[3:6]  # marks are kept too
    data = few_shot_data(config, found, tmp_path / "run")
    assert sorted(i for i, _ in data.list.entries) == sorted(ids[:4])
    data.list.write(tmp_path / "run" / "fewshot.txt")
    assert fewshot_list.read_list(tmp_path / "run" / "fewshot.txt") == data.list
    for case in found.test[:2]:
        volume, truth = cache.read_case(case, found.table)
        result = LabeledVolume(case.case_id, truth, volume.spacing, volume.source, truth=truth)
        options = dict(names=found.table.names, window=(0, 1), nsd_tolerance_mm=1, min_pixels=1)
        rows, _ = score_and_write(result, folder=tmp_path, **options)
        assert {row["case"] for row in rows} == {case.case_id}
        assert (tmp_path / "predictions" / f"{case.case_id}.nii.gz").is_file()


def test_names_that_become_one_id(tmp_path):
    root = write_data(tmp_path, ("a b", "a_b", "c"))
    with pytest.raises(UserError, match=r"several image files for case a_b \(a b.nii.gz, a_b.nii"):
        find.find_cases("pairs", root, *GLOBS)
    for kind in ("images", "labels"):
        (root / kind / "a b.nii.gz").rename(root / kind / "C.nii.gz")
        for case in ("a_b", "c"):
            (root / kind / f"_{case}").mkdir()
            os.link(root / kind / f"{case}.nii.gz", root / kind / f"_{case}" / "t1.nii.gz")
    listing = find.scan("pairs", root, *GLOBS)
    assert not listing.errors and "only by upper and lower case" in listing.findings[0].message
    (root / "images/_a b").mkdir()
    os.link(root / "images/c.nii.gz", root / "images/_a b/t1.nii.gz")
    with pytest.raises(UserError, match=r"\S+/_a b/t1.nii.gz, \S+/_a_b/t1.nii.gz"):
        find.find_cases("pairs", root, "images/_*/t1.nii.gz")


@pytest.mark.filterwarnings("ignore:The files carry no voxel size")
def test_lists_of_transunet(tmp_path):
    patient, test = "Müller é 1", "病例" * 30
    root = write_transunet(tmp_path, cases=(patient,), tests=(test,))
    for path in (root / "train_npz").iterdir():
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    cases = find.find_cases("transunet", root)
    assert [case.case_id for case in cases] == ["Müller_é_1", safe_case_id(test)]
    assert len(cases[0].image.files) == 10 and cases[1].image.is_file()
    (root / "train_npz" / "Müller_é 1_slice003.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="are both Müller_é_1_slice003"):
        find.find_cases("transunet", root)


@pytest.mark.parametrize("name", ["a" * 255, "病" * 85, "é" * 120 + ".nii.gz"])
def test_the_longest_names_are_written(tmp_path, name):
    write_text(tmp_path / name, "text")
    with atomic_path(tmp_path / name) as temporary:
        assert temporary.suffixes[-2:] == (tmp_path / name).suffixes[-2:]
        temporary.write_text("other")
    assert (tmp_path / name).read_text() == "other" and len(list(tmp_path.iterdir())) == 1


HARD = [
    "background",
    "a$b$",
    r"$\frac{$",
    "<b>x</b>",
    "x|y",
    "100 %",
    "a_b^c",
    "`q` *w* [l](m) _n_ &lt;",
]


def test_figures_show_names_literally(tmp_path):
    r"""What looks like mathtext would be drawn as such, or, as `$\frac{$`, end the program."""
    ids = np.arange(8, dtype=np.uint8)[:, None, None].repeat(6, 1).repeat(6, 2)
    ids = np.broadcast_to(np.arange(48).reshape(6, 8) % 8, (3, 6, 8)).astype(np.uint8)
    image = np.zeros(ids.shape, np.float32)
    title = r"case $\frac{$ a_b^c"
    figure = overlays.overlay_slice(image[0], ids[0], ids[0], (1.0, 1.0), HARD, title)
    texts = [*figure.texts, *figure.legends[0].get_texts()]
    shown = {text.get_text() for text in texts}
    assert title in shown and {f"{name.replace('_', ' ')}  1.00" for name in HARD[1:]} <= shown
    assert not any(text.get_parse_math() for text in texts)
    overlays.write_preview(
        image, ids, (1.0, 1.0, 1.0), HARD, tmp_path / r"$\frac{$.png", directions="SPL"
    )
    paths = overlays.write_overlays(
        image, ids, ids, (1, 1, 1), HARD, "हिन्दी", tmp_path, directions="SPL"
    )
    assert all(path.name.startswith("हिन्दी_") for path in paths) and paths


def test_pages_and_tables_show_names_literally():
    for name in HARD[1:]:
        cell = escape_cell(name)
        assert re.sub(r"\\([^\w\s]|_)", r"\1", cell) == name  # a renderer drops the backslashes
        assert not re.search(r"(?<!\\)(\\\\)*[|*<`$\[~]", cell)
        assert html.unescape(escape(name)) == name and not re.search("[<>]", escape(name))
    assert link(os.fsdecode(b"u\xff"), "x") == '<a href="u%FF">x</a>'


def test_a_mask_of_a_long_name(tmp_path):
    root = write_data(tmp_path, ("a",))
    volume = read_image(root / "images" / "a.nii.gz")
    path = tmp_path / ("病" * 82 + ".nii.gz")
    write_label(path, np.zeros(volume.array.shape, np.uint8), volume.source)
    assert nib.load(path).shape == (24, 20, 10)
