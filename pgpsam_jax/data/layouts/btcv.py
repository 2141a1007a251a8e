"""Layout BTCV / Synapse: `RawData/Training/{img,label}`."""

import re
from pathlib import Path

from pgpsam_jax.data.io.volume_files import stem_of, volumes_in
from pgpsam_jax.data.layouts.cases import Listing, check_root, pair
from pgpsam_jax.errors import UserError

_FOLDERS = ("RawData/Training", "Training", ".", "Abdomen/RawData/Training")
EXPECTED = (
    "expected RawData/Training/img/img0001.nii.gz and RawData/Training/label/label0001.nii.gz; "
    "RawData.zip is in Synapse project syn3193805 (www.synapse.org, registration needed)"
)


def find_base(root: Path) -> Path | None:
    """Returns the folder that holds `img` and `label`, if there is one."""
    return next((root / f for f in _FOLDERS if (root / f / "img").is_dir()), None)


def scan(root: Path) -> Listing:
    """Returns the cases of `root`, which holds, or is inside, `RawData/Training`."""
    check_root(root, EXPECTED)
    base = find_base(root)
    if base is None:
        raise UserError(f"no img folder of the BTCV layout under {root}: {EXPECTED}")
    images, labels = _numbered(base, "img"), _numbered(base, "label")
    listing = pair(images, labels, base, EXPECTED)
    for kind, found in (("img", images), ("label", labels)):
        listing.note_skipped(base / kind, [path for _, path in found])
    return listing


def _numbered(base: Path, kind: str) -> list[tuple[str, Path]]:
    """Returns (number, path) of the volumes named by their folder and a number: img0001."""
    found = ((re.fullmatch(kind + "([0-9]+)", stem_of(p)), p) for p in volumes_in(base / kind))
    return [(match[1], path) for match, path in found if match]
