"""Finds the cases of a data set on disk, whatever its layout."""

import warnings
from pathlib import Path

from pgpsam_jax.data.io.array_files import NO_GRID
from pgpsam_jax.data.layouts import btcv, nnunet, pairs, transunet
from pgpsam_jax.data.layouts.cases import Case, Listing, check_root
from pgpsam_jax.data.layouts.label_table import SYNAPSE8, LabelTable
from pgpsam_jax.errors import UserError

# Layouts that need only a folder: modules with `EXPECTED` and `scan(root)`.
FOLDERS = {"btcv": btcv, "nnunet": nnunet, "transunet": transunet}
LAYOUTS = (*FOLDERS, "pairs")


def find_cases(layout: str, root, image_glob=None, label_glob=None) -> list[Case]:
    """Returns the cases of a data set, sorted by id.

    Args:
        layout: one of `LAYOUTS`; see the module of that name.
        root: folder of the data set.
        image_glob, label_glob: of layout `pairs`.

    Raises:
        UserError: the name of some file is wrong.
    """
    listing = scan(layout, root, image_glob, label_glob)
    if errors := listing.errors:
        more = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise UserError(f"in {root} {', '.join(errors[:5])}{more}; {listing.expected}")
    if layout == "transunet":
        warnings.warn(NO_GRID, stacklevel=2)
    for line in listing.skipped:
        warnings.warn(line, stacklevel=2)
    cases = [case for case in listing.cases if case.label is not None] or listing.cases
    if aside := len(listing.cases) - len(cases):
        warnings.warn(f"{aside} image(s) of {root} without a label are ignored", stacklevel=2)
    return sorted(cases, key=lambda case: case.case_id)


def expected(layout: str, image_glob=None, label_glob=None) -> str:
    """Returns what the folder of a layout holds, for messages."""
    if layout == "pairs":
        return f"expected a folder with {image_glob} and {label_glob}"
    if layout in FOLDERS:
        return FOLDERS[layout].EXPECTED
    return "expected a folder to write the data set to"


def scan(layout: str, root, image_glob=None, label_glob=None) -> Listing:
    """Returns all cases and the problems with the names of their files (see `find_cases`)."""
    root = Path(root)
    if layout in FOLDERS:
        listing = FOLDERS[layout].scan(root)
    elif layout == "pairs":
        listing = pairs.scan(root, image_glob, label_glob)
    else:
        raise UserError(f"unknown data layout {layout!r}; known are {', '.join(LAYOUTS)}")
    listing.check_names()
    return listing


def detect(root, image_glob=None) -> str:
    """Returns the layout of a folder by its content; `pairs` if an `image_glob` is given."""
    root = Path(root)
    check_root(root, "give the folder of a data set")
    if image_glob:
        return "pairs"
    if (root / "dataset.json").is_file():
        return "nnunet"
    if (root / transunet.TRAIN).is_dir() or (root / transunet.TEST).is_dir():
        return "transunet"
    if btcv.find_base(root) is not None:
        return "btcv"
    raise UserError(
        f"{root} is of no known layout: {btcv.EXPECTED}; or {nnunet.EXPECTED}; or "
        f"{transunet.EXPECTED}; or give layout pairs with image_glob and label_glob"
    )


def label_table(layout: str, root) -> LabelTable | None:
    """Returns the label table built into a layout, or None if the user has to give a file."""
    if layout == "nnunet":
        return nnunet.label_table(root)
    return SYNAPSE8 if layout in ("btcv", "phantom") else None
