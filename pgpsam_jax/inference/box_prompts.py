"""Segments volumes slice by slice with SAM and a box for each label: `BoxPredictor`.

Letters: D slices, H rows, W columns of a volume, K classes with background, B boxes of a slice.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pgpsam_jax.data.boxes import SliceBox, SliceBoxes
from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.preprocessing import Preprocessing, intensity_limits
from pgpsam_jax.inference.sam_predictor import THRESHOLD, SamPredictor
from pgpsam_jax.metrics.overlap import dice_of_counts, overlap_counts


class BoxPredictor:
    """Volumes to class ids, by a frozen SAM that is given boxes; stands for a `Predictor`.

    The box of a label gives one mask (SAM's first mask token), several of them the union of theirs.
    Masks of different labels may overlap; a pixel is of the one with the highest logit.

    Args:
      sam: the model.
      preprocessing: its `window` and `levels` are used.
      boxes_of: returns the boxes of a volume, and its true class ids (D, H, W) or None.
      num_classes: K.
      widening: pixels by which a box is wider than its edges on every side, up to the border.
      mirrored: shows SAM the patient's right on the right, instead of on the left as radiologists
        see it.

    Attributes:
      dice: for each volume with true ids, Dice (2, K - 1) of the labels' masks on their own and of
        the class ids; NaN for a label that is in neither.
    """

    def __init__(
        self,
        sam: SamPredictor,
        preprocessing: Preprocessing,
        boxes_of: Callable[[Volume], tuple[SliceBoxes, np.ndarray | None]],
        *,
        num_classes: int,
        widening: float = 0.0,
        mirrored: bool = False,
    ):
        self.preprocessing, self.dice = preprocessing, dict[str, np.ndarray]()
        self._sam, self._boxes_of = sam, boxes_of
        self._classes, self._widening, self._step = num_classes, widening, -1 if mirrored else 1

    def __call__(self, volume: Volume) -> np.ndarray:
        """Returns class ids (D, H, W) uint8 in the volume's display orientation."""
        boxes, truth = self._boxes_of(volume)
        ids = np.zeros(volume.array.shape, np.uint8)
        own = np.zeros((3, self._classes - 1), np.int64)  # both, predicted, true
        for index, classes, logits in self._masks(volume.array, boxes):
            inside = logits > THRESHOLD
            ids[index] = np.where(inside.any(0), classes[logits.argmax(0)], 0)
            own[1, classes - 1] += inside.sum((1, 2))
            if truth is not None:
                right = inside & (truth[index] == classes[:, None, None])
                own[0, classes - 1] += right.sum((1, 2))
        if truth is not None:
            counts = overlap_counts(ids, truth, self._classes).sum(1)
            own[2] = counts[2]
            both = np.stack([dice_of_counts(own), dice_of_counts(counts)])
            self.dice[str(volume.source.path)] = both
        return ids

    def _masks(
        self, images: np.ndarray, boxes: SliceBoxes
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields slice, classes (C,) and their logits (C, H, W) at native pixels."""
        limits = intensity_limits(self.preprocessing.window, images)
        for index, of_slice in sorted(boxes.items()):
            image = self.preprocessing.normalize(images[index : index + 1], limits)[0]
            prompts = widened(of_slice, self._widening, image.shape)
            if self._step < 0:
                prompts[:, [0, 2]] = image.shape[1] - prompts[:, [2, 0]]
            self._sam.set_image(image[:, :: self._step])
            found = self._sam.predict(box=prompts, multimask=False, return_logits=True)
            logits = found.masks[:, 0, :, :: self._step]
            of_box = np.array([box.class_id for box in of_slice])
            classes = np.unique(of_box)
            yield index, classes, np.stack([logits[of_box == c].max(0) for c in classes])


def widened(boxes: Sequence[SliceBox], pixels: float, shape: tuple[int, ...]) -> np.ndarray:
    """Returns xyxy (B, 4) of boxes with their edges moved outward, within an image (H, W)."""
    edges = np.array([box.edges for box in boxes], float).reshape(-1, 2, 2)
    edges += np.array([[-pixels], [pixels]])
    return np.clip(edges, 0, shape[::-1]).reshape(-1, 4)
