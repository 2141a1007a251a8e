"""Converts a SAM checkpoint to this project's weights, or back.

    python -m weights_conversion.convert --source sam_vit_b_01ec64.pth --output weights/sam_vit_b
    python -m weights_conversion.convert --reverse --layout official \\
        --source weights/sam_vit_b --output sam.pth

A checkpoint of the PGP-SAM authors' code to a workdir for prediction and evaluation, or any workdir
of preset `release` back to such a checkpoint:

    python -m weights_conversion.convert --kind pgpsam_release \\
        --source best_ckpt.pth --output runs/release --config configs/synapse_release.py
    python -m weights_conversion.convert --kind pgpsam_release --reverse \\
        --source runs/release --output best_ckpt.pth

Torchvision's ResNet-18 to the initial CNN of method `samlst`:

    python -m weights_conversion.convert --kind resnet18 \\
        --source resnet18-f37072fd.pth --output weights/resnet18

Reads `.pth` (without torch, without running code) and `.safetensors` files. SAM is written as
`<output>.safetensors` and `<output>.json`. Conversion only renames, transposes and stacks tensors.
Names, shapes and exact round trips are tested for both layouts; the published files themselves were
not available.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.weights import (
    COLORS,
    MASK_TOKENS,
    OFFICIAL,
    base_files,
    how_to_get,
    load_base,
)
from pgpsam_jax.runtime.cli import Parser, running
from pgpsam_jax.utils.files import file_digest
from weights_conversion import resnet, sam
from weights_conversion.checkpoint_files import (
    check_suffix,
    read_checkpoint,
    refuse_overwriting,
    report_source,
    write_checkpoint,
)
from weights_conversion.remap import read, write


def convert(
    source,
    output,
    *,
    colors: str | None = None,
    mask_tokens: Sequence[int] | None = None,
    allow_unknown_md5: bool = False,
    overwrite: bool = False,
    log=print,
) -> dict:
    """Writes `<output>.safetensors` and `<output>.json` from a SAM checkpoint.

    Args:
      source: checkpoint file, or folder with `model.safetensors`.
      output: stem of the two files.
      colors, mask_tokens: see `TrainedFor`; those of SAM or LiteMedSAM by default.
      allow_unknown_md5: convert a file with an official name but another MD5.
      overwrite: replace files of other content.
      log: called with each line of the report.

    Returns:
      The content of `<output>.json`.

    Raises:
      UserError: the source is damaged or no SAM, or files of other content are at `output`.
    """
    file = _source_file(Path(source), output)
    weights, sidecar = base_files(output)
    refuse_overwriting(file, weights)
    sha256, md5 = report_source(file, log), file_digest(file, "md5")
    official = _official_name(file, md5, allow_unknown_md5, log)
    tensors = read_checkpoint(file).tensors
    layout = sam.detect_layout(tensors, str(file))
    log(f"read     {len(tensors)} tensors in the {layout} layout")
    ours = read(sam.LAYOUTS[layout], tensors, str(file))
    unused = sam.LAYOUTS[layout].unused
    casts = {
        name: tensor.dtype.name
        for name, tensor in tensors.items()
        if tensor.dtype != np.float32 and not re.fullmatch(unused, name)
    }
    if casts:
        log(f"cast     {len(casts)} tensors to float32 (listed in {sidecar.name})")
    origin = {
        "layout": layout,
        "source": file.name,
        "source_sha256": sha256,
        "source_md5": md5,
        "official_file": official,
        "casts": [{"tensor": name, "from": dtype} for name, dtype in sorted(casts.items())],
    }
    trained: dict = {} if colors is None else {"colors": colors}
    trained |= {} if mask_tokens is None else {"mask_tokens": [*mask_tokens]}
    meta = sam.store(output, ours, origin, trained=trained, overwrite=overwrite)
    log(f"wrote    {weights} and {sidecar.name}")
    if meta["variant"] == "custom":
        log("note     width and depth are those of no SAM encoder")
    log(
        f"summary  {meta['variant']}, {meta['image_size']} px, patch {meta['patch_size']}, "
        f"{meta['colors']} colors, mask tokens {', '.join(map(str, meta['mask_tokens']))}, "
        f"{meta['tensor_count']} tensors, {meta['parameter_count']:,} parameters"
    )
    return meta


def reverse(source, output, layout: str, *, overwrite: bool = False, log=print) -> None:
    """Writes converted weights back as a `.pth` (needs torch) or `.safetensors` checkpoint."""
    output = Path(output)
    check_suffix(output)
    base = load_base(source)
    log(f"read     {len(base.tensors)} tensors, {base.meta['variant']}")
    refuse_overwriting(base_files(source)[0], output)
    tensors = write(sam.LAYOUTS[layout], base.tensors, str(source))
    write_checkpoint(output, tensors, overwrite=overwrite)
    log(f"wrote    {output}, {len(tensors)} tensors in the {layout} layout")


def _source_file(source: Path, output) -> Path:
    file = source / "model.safetensors" if source.is_dir() else source
    if not file.is_file():
        # Its publisher's tools fill a folder; only for a file do we know the download.
        if source.is_dir():
            raise UserError(f"{source} holds no model.safetensors; give the checkpoint file itself")
        raise UserError(f"{source} does not exist; {how_to_get(output, source)}")
    return file


def _official_name(file: Path, md5: str, allow_unknown: bool, log) -> str | None:
    """Returns the name of the published file with this MD5; refuses another file of such a name."""
    known = {official.md5: official for official in OFFICIAL.values()}
    claimed = next((o for o in OFFICIAL.values() if o.file == file.name), None)
    if claimed and claimed.md5 != md5:
        problem = f"{file} has MD5 {md5} instead of {claimed.md5}"
        if not allow_unknown:
            raise UserError(
                f"{problem}: the download is damaged or it is another file; download "
                f"{claimed.address} again, or pass --allow-unknown-md5 if you mean this file"
            )
        log(f"warning  {problem}, converted because of --allow-unknown-md5")
    return known[md5].file if md5 in known else None


def _parser() -> Parser:
    parser = Parser("weights_conversion.convert", __doc__)
    parser.add_argument(
        "--kind",
        choices=("sam", "pgpsam_release", "resnet18"),
        default="sam",
        help="of the checkpoint",
    )
    parser.add_argument(
        "--source", required=True, help="checkpoint file, or folder holding model.safetensors"
    )
    parser.add_argument("--output", required=True, help="stem of two files, workdir, or file")
    parser.add_argument("--reverse", action="store_true", help="from our weights to a checkpoint")
    parser.add_argument(
        "--layout", choices=sorted(sam.LAYOUTS), help="SAM: layout that --reverse writes"
    )
    parser.add_argument(
        "--colors", choices=COLORS, help="SAM: that it was trained on, if not those of its layout"
    )
    parser.add_argument(
        "--mask-tokens",
        type=int,
        nargs="+",
        choices=MASK_TOKENS,
        help="SAM: that were trained last, such as 0 of MedSAM",
    )
    parser.add_argument(
        "--allow-unknown-md5",
        action="store_true",
        help="SAM: convert a file that has an official name but not the official MD5",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --output if it has other content"
    )
    parser.add_argument(
        "--config",
        help="PGP-SAM: config file of the workdir, fields as --config.data.root=FOLDER; without it "
        "configs/synapse_release.py for 9 classes, configs/ventricle_release.py for 5",
    )
    return parser


def main(argv=None) -> None:
    """Entry point; `argv` replaces the command line."""
    with running():
        _main(argv)


def _main(argv) -> None:
    parser = _parser()
    arguments, fields = parser.parse_known_args(argv)
    if strange := [field for field in fields if not field.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    settings = [f"--config={arguments.config}"] * bool(arguments.config) + fields
    kind, backwards = arguments.kind, arguments.reverse
    paths, options = (arguments.source, arguments.output), {"overwrite": arguments.overwrite}
    trained = {"colors": arguments.colors, "mask_tokens": arguments.mask_tokens}
    if kind != "sam" and (arguments.layout or arguments.allow_unknown_md5 or any(trained.values())):
        parser.error("--layout, --colors, --mask-tokens, --allow-unknown-md5 go with --kind sam")
    if kind != "pgpsam_release" and settings:
        parser.error("--config goes with --kind pgpsam_release")
    if kind == "pgpsam_release":
        from weights_conversion import release  # imports JAX, which SAM does not need

        if backwards and settings:
            parser.error("--reverse takes no --config: the workdir has its own")
        if backwards:
            release.reverse(*paths, **options)
        else:
            release.convert(*paths, settings)
    elif kind == "resnet18":
        if backwards:
            parser.error("--kind resnet18 has no --reverse")
        resnet.convert(*paths, **options)
    elif backwards != (arguments.layout is not None):
        parser.error("--reverse and --layout go together")
    elif backwards:
        reverse(*paths, arguments.layout, **options)
    else:
        convert(*paths, allow_unknown_md5=arguments.allow_unknown_md5, **trained, **options)


if __name__ == "__main__":
    main(sys.argv[1:])
