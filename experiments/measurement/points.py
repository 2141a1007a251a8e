"""Points: a point is one measurement, its `key` names its row."""

import dataclasses
import itertools

from pgpsam_jax.config import default_config
from pgpsam_jax.errors import UserError

CLASSES = 9  # eight organs and background, as Synapse
SLICES = 221  # of the paper's few-shot list


@dataclasses.dataclass(frozen=True)
class Point:
    """The size and the settings of a model to measure.

    Attributes:
      batch: images per chip.
      remat, attention, scan: of `config.model`.
      dtype: of the computation.
    """

    encoder: str = "vit_b"
    image_size: int = 512
    batch: int = 1
    remat: str = "none"
    attention: str = "auto"
    scan: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.image_size < 1 or self.batch < 1:
            raise UserError("--sizes and --batches must be 1 or more")

    @property
    def key(self) -> str:
        """Name of the row: all fields."""
        return " ".join(map(str, dataclasses.astuple(self)))

    @property
    def patch_size(self) -> int:
        """Pixels of a token: 16, and 4 for TinyViT as LiteMedSAM has it."""
        return 4 if self.encoder == "tiny_vit" else 16

    @property
    def settings(self) -> dict[str, str | bool]:
        """The settings as fields of `config.model`."""
        return {"attention": self.attention, "remat": self.remat, "scan_blocks": bool(self.scan)}

    def config(self):
        """Returns the configuration of a run with this model and batch."""
        config = default_config()
        config.model.update(
            encoder=self.encoder,
            image_size=self.image_size,
            patch_size=self.patch_size,
            compute_dtype=self.dtype,
            **self.settings,
        )
        config.train.batch_size = self.batch
        return config


def cross(kind: type[Point], **lists) -> list:
    """Returns every combination of the values of a point's fields, the last field fastest."""
    rows = itertools.product(*lists.values())
    return unique(kind(**dict(zip(lists, row, strict=True))) for row in rows)


def unique(points) -> list:
    """Drops points whose key is already there."""
    return list({point.key: point for point in points}.values())
