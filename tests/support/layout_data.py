"""The small data set of `small_run` in the layouts of nnU-Net and of TransUNet."""

import json
import shutil

import h5py
import numpy as np

from pgpsam_jax.data.io.volumes import read_image, read_label
from tests.support.small_run import TABLE, config_for, write_data

NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "spleen": 1, "liver": 6},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
WINDOW = (-125.0, 275.0)


def write_nnunet(root, cases=("a", "b", "c"), tests=(), labeled_tests=True, **fields):
    """imagesTr, labelsTr, imagesTs, perhaps labelsTs, and dataset.json with other `fields`."""
    write_data(root / "pairs", (*cases, *tests))
    for case in (*cases, *tests):
        part = "Ts" if case in tests else "Tr"
        for kind, name in (("images", f"{case}_0000.nii.gz"), ("labels", f"{case}.nii.gz")):
            (root / f"{kind}{part}").mkdir(exist_ok=True)
            shutil.move(root / "pairs" / kind / f"{case}.nii.gz", root / f"{kind}{part}" / name)
    if tests and not labeled_tests:
        shutil.rmtree(root / "labelsTs")
    shutil.rmtree(root / "pairs")
    value = NNUNET | {"numTraining": len(cases)} | fields
    (root / "dataset.json").write_text(json.dumps(value))
    return root


def write_transunet(root, cases=("case0005", "case0006"), tests=("case0008",), lists=True):
    """Slices and volumes in [0, 1] with float labels, as TransUNet's own files, and a table."""
    write_data(root / "pairs", (*cases, *tests))
    (root / "train_npz").mkdir()
    (root / "test_vol_h5").mkdir()
    names = []
    for case in (*cases, *tests):
        image = read_image(root / "pairs/images" / f"{case}.nii.gz").array
        image = (np.clip(image, *WINDOW) - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
        label = read_label(root / "pairs/labels" / f"{case}.nii.gz").array.astype(np.float32)
        if case in tests:
            with h5py.File(root / "test_vol_h5" / f"{case}.npy.h5", "w") as file:
                file["image"], file["label"] = image, label
            continue
        for index in range(len(image)):
            names.append(f"{case}_slice{index:03d}")
            arrays = {"image": image[index], "label": label[index]}
            np.savez(root / "train_npz" / f"{names[-1]}.npz", **arrays)
    shutil.rmtree(root / "pairs")
    if lists:
        folder = root / "lists" / "lists_Synapse"
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text("".join(f"{name}\n" for name in reversed(names)))
        (folder / "test_vol.txt").write_text("".join(f"{name}\n" for name in tests))
    (root / "table.json").write_text(json.dumps(TABLE))
    return root


def layout_config(root, layout: str, **settings):
    """`small_run`'s configuration for one of these folders."""
    own = {"data__layout": layout, "data__image_glob": "", "data__label_glob": ""}
    if layout == "nnunet":
        own |= {"data__label_table": "", "data__split": "fraction"}
    else:
        own |= {"data__split": "given", "data__window": (0.0, 1.0)}
    return config_for(root, **(own | settings))
