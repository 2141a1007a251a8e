"""A SAM prompted with boxes, as `predict` uses a trained run: `BoxRun`; its table of Dice."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgpsam_jax.data.boxes import boxes_around, class_names, read_boxes, slice_boxes
from pgpsam_jax.data.cache import read_truth
from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.io.volume_files import stem_of, volumes_in
from pgpsam_jax.data.layouts.label_table import LabelTable, load_label_table
from pgpsam_jax.data.preprocessing import Percentiles, Preprocessing, Window
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.masks import DICE, file_id
from pgpsam_jax.inference.box_prompts import BoxPredictor
from pgpsam_jax.inference.sam_predictor import SamPredictor
from pgpsam_jax.metrics.aggregate import defined_mean
from pgpsam_jax.models.sam.weights import base_files
from pgpsam_jax.runtime.compilation_cache import keep_compiled, start
from pgpsam_jax.utils.files import StrPath, csv_text, file_digest, write_text
from pgpsam_jax.utils.markdown import one_line, pipe_table
from pgpsam_jax.utils.untrusted_text import sanitize

ORACLE = "ORACLE: the boxes come from the labels that the masks are scored against"
_WINDOW = Percentiles(0.5, 99.5)  # what MedSAM clips images other than CT to
_CHANNEL = "_0000"  # in nnU-Net's names of images


@dataclass(frozen=True, eq=False)
class BoxRun:
    """A predictor by boxes, with what is recorded of it.

    Attributes:
        predictor: volumes to class ids.
        label_names: K class names, the background first.
        identity: weights and prompts in words, and a digest of all that the masks depend on.
        oracle: whether the boxes are those of the truth.
        prompted: {name of a volume: whether it has boxes}.
    """

    predictor: BoxPredictor
    label_names: tuple[str, ...]
    identity: dict[str, str]
    oracle: bool
    prompted: Mapping[str, bool]

    def remarks(self, volume: Volume) -> list[str]:
        """Returns warnings about a volume's voxel grid and prompts."""
        found = [*volume.source.remarks().values()]
        if self.oracle:
            found.append(ORACLE)
        if not self.prompted[stem_of(volume.source.path)]:
            found.append("has no box, so that its mask is empty")
        return found

    def write_dice(self, folder: StrPath) -> None:
        """Writes Dice per volume and label to `<folder>/dice.csv` and prints the means, if any."""
        scores = self.predictor.dice
        if not scores:
            return
        organs = self.label_names[1:]
        rows = [
            {"file": Path(path).name, "organ": organ, "own": own, "on_top": on_top}
            for path, pairs in scores.items()
            for organ, own, on_top in zip(organs, *pairs.tolist(), strict=True)
        ]
        write_text(Path(folder) / DICE, csv_text(["file", "organ", "own", "on_top"], rows))
        means = defined_mean(np.stack([*scores.values()]), axis=0)
        table = [["organ", "Dice of its mask", "Dice where it is on top"]]
        for organ, pair in zip(organs, means.T, strict=True):
            table.append([one_line(organ), *("n/a" if np.isnan(x) else f"{x:.3f}" for x in pair)])
        print(f"mean over {len(scores)} volume(s)" + f"; {ORACLE}" * self.oracle)
        print(*pipe_table(table), sep="\n")


def open_box_run(
    files: Sequence[Path],
    base: str,
    *,
    output: StrPath,
    boxes: str | None = None,
    truth: str | None = None,
    label_table: str | None = None,
    window: Window | None = None,
    widening: float | None = None,
    mirrored: bool = False,
) -> BoxRun:
    """Loads a SAM to be prompted for volumes.

    Args:
        files: the volumes.
        base: stem of converted SAM weights.
        output: folder of the masks to come, which must not be that of the truth.
        boxes: table of boxes (`data.boxes.read_boxes`); None for those of the truth, an oracle.
        truth: label file of the one volume, or folder with a label of the name of each.
        label_table: names the classes; without truth, by default the labels of `boxes`.
        window: intensities that map to 0 and 1; by default percentiles of each volume.
        widening: pixels added to the boxes on every side; by default 0, of an oracle 1.
        mirrored: as in `BoxPredictor`.

    Raises:
        UserError: some file is missing or wrong.
    """
    widening = (0.0 if boxes else 1.0) if widening is None else widening
    if not 0 <= widening < math.inf:
        raise UserError(f"boxes cannot be widened by {widening:g} pixels; give 0 or more")
    if truth and not label_table:
        raise UserError("labels need a --label-table, which names their classes")
    given = read_boxes(boxes) if boxes else {}
    stems = [stem_of(path) for path in files]
    if boxes and not any(stem in given for stem in stems):
        raise UserError(
            f"table of boxes {boxes} has no box for {sanitize(files[0].name)}; its column "
            "file must hold the names of the volumes"
        )
    names = class_names(given)
    table = (
        load_label_table(label_table)
        if label_table
        else LabelTable(names, {i: i for i in range(len(names))})
    )
    labels = _labels(files, Path(truth)) if truth else {}
    if any(file_id(label.parent) == file_id(Path(output)) for label in labels.values()):
        raise UserError(
            f"--output {output} is the folder of the labels, which masks would replace; choose "
            "another --output"
        )
    ids = {name: i for i, name in enumerate(table.names) if i}

    def boxes_of(volume: Volume):
        stem = stem_of(volume.source.path)
        true = read_truth(volume.source, labels[stem], table) if stem in labels else None
        if true is not None and not boxes:
            return boxes_around(true), true
        return slice_boxes(given.get(stem, ()), volume.source, ids), true

    keep_compiled()
    start()
    sam = SamPredictor.from_pretrained(base)
    window = window or _WINDOW
    predictor = BoxPredictor(
        sam,
        Preprocessing(sam.image_size[0], window),
        boxes_of,
        num_classes=table.num_classes,
        widening=widening,
        mirrored=mirrored,
    )
    inputs = [base_files(base)[0], *([boxes] if boxes else labels.values())]
    facts = [
        *map(file_digest, inputs),
        [*map(float, window)],
        type(window).__name__,
        widening,
        mirrored,
    ]
    digest = hashlib.sha256(json.dumps([facts, table.to_json()]).encode()).hexdigest()
    return BoxRun(
        predictor,
        table.names,
        {"workdir": f"{base}, {f'boxes of {boxes}' if boxes else ORACLE}", "parameters": digest},
        not boxes,
        {stem: not boxes or stem in given for stem in stems},
    )


def _labels(files: Sequence[Path], truth: Path) -> dict[str, Path]:
    """The label of each volume, by the name of the volume."""
    if not truth.is_dir():
        if len(files) > 1:
            raise UserError(f"{truth} is one label for {len(files)} volumes; give their folder")
        return {stem_of(files[0]): truth}
    there = {stem_of(path): path for path in volumes_in(truth)}
    found = {}
    for path in files:
        stem = stem_of(path)
        label = there.get(stem, there.get(stem.removesuffix(_CHANNEL)))
        if label is None:
            raise UserError(
                f"{truth} has no label for {sanitize(path.name)}; name the labels as the volumes"
            )
        found[stem] = label
    return found
