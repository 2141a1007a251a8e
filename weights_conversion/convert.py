"""Convert a SAM checkpoint to this project's weights, or back.

    python -m weights_conversion.convert --source sam_vit_b_01ec64.pth --output weights/sam_vit_b
    python -m weights_conversion.convert --reverse --layout official \\
        --source weights/sam_vit_b --output sam.pth

Reads the official `.pth` (without torch, without running code) and Hugging Face `.safetensors`
files; writes `<output>.safetensors` and `<output>.json`. Conversion only renames, transposes and
stacks tensors: it is checked for names, shapes and exact round trips on the official layout, the
official files themselves were not at hand.
"""

import argparse
import contextlib
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.files import atomic_path, file_digest, write_json
from pgpsam_jax.weights import (
    FORMAT,
    FORMAT_VERSION,
    OFFICIAL,
    base_files,
    how_to_get,
    load_base,
    read_safetensors,
)
from weights_conversion import mapping
from weights_conversion.torch_file import ZIP_MAGIC, read_torch_file

FROM = {"official": mapping.from_official, "huggingface": mapping.from_huggingface}
TO = {"official": mapping.to_official, "huggingface": mapping.to_huggingface}


def convert(source, output, *, allow_unknown_md5: bool = False, log=print) -> dict:
    """Write `<output>.safetensors` and `<output>.json` from a checkpoint; return the sidecar."""
    file = _source_file(Path(source), output)
    weights, sidecar = base_files(output)
    if weights.exists() and weights.samefile(file):
        raise UserError(f"{output} would overwrite the source {file}; choose another --output")
    digests = {name: file_digest(file, name) for name in ("sha256", "md5")}
    log(f"source   {file}, {file.stat().st_size / 2**20:.0f} MiB, SHA-256 {digests['sha256']}")
    official = _official_name(file, digests["md5"], allow_unknown_md5, log)
    tensors = _read(file)
    layout = mapping.detect_layout(tensors, str(file))
    log(f"read     {len(tensors)} tensors in the {layout} layout")
    ours = FROM[layout](tensors, str(file))
    casts = {n: t.dtype.name for n, t in tensors.items() if t.dtype != np.float32}
    if casts:
        log(f"cast     {len(casts)} tensors to float32 (listed in {sidecar.name})")
    with _writing(weights), atomic_path(weights) as temporary:
        _save_safetensors(temporary, ours)
        digest = file_digest(temporary)
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **mapping.describe(ours),
        "layout": layout,
        "source": file.name,
        "source_sha256": digests["sha256"],
        "source_md5": digests["md5"],
        "official_file": official,
        "sha256": digest,
        "tensor_count": len(ours),
        "parameter_count": sum(array.size for array in ours.values()),
        "casts": [{"tensor": name, "from": dtype} for name, dtype in sorted(casts.items())],
    }
    with _writing(sidecar):
        write_json(sidecar, meta)
    log(f"wrote    {weights} and {sidecar.name}")
    if meta["variant"] == "custom":
        log("note     width and depth are not those of vit_b, vit_l or vit_h")
    log(
        f"summary  {meta['variant']}, {meta['image_size']} px, patch {meta['patch_size']}, "
        f"{meta['tensor_count']} tensors, {meta['parameter_count']:,} parameters"
    )
    return meta


def reverse(source, output, layout: str, *, log=print) -> None:
    """Write converted weights back as a `.pth` (needs torch) or `.safetensors` checkpoint."""
    output = Path(output)
    if output.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{output} should end in .pth or .safetensors; change --output")
    base = load_base(source)
    log(f"read     {len(base.tensors)} tensors, {base.meta['variant']}")
    if output.exists() and output.samefile(base_files(source)[0]):
        raise UserError(f"{output} would overwrite the source; choose another --output")
    tensors = TO[layout](base.tensors, str(source))
    with _writing(output), atomic_path(output) as temporary:
        if output.suffix == ".pth":
            _save_torch(temporary, tensors)
        else:
            _save_safetensors(temporary, tensors, {"format": "pt"})  # transformers asks for it
    log(f"wrote    {output}, {len(tensors)} tensors in the {layout} layout")


def _source_file(source: Path, output) -> Path:
    file = source / "model.safetensors" if source.is_dir() else source
    if not file.is_file():
        # A folder is filled by its publisher's tools, so only files are told how to download.
        if source.is_dir():
            raise UserError(f"{source} holds no model.safetensors; give the checkpoint file itself")
        raise UserError(f"{source} does not exist; {how_to_get(output, source)}")
    return file


def _official_name(file: Path, md5: str, allow_unknown: bool, log) -> str | None:
    """Name of the published file with this MD5; an error if `file` only has such a name."""
    known = {official.md5: official for official in OFFICIAL.values()}
    claimed = next((o for o in OFFICIAL.values() if o.name == file.name), None)
    if claimed and claimed.md5 != md5:
        problem = f"{file} has MD5 {md5} instead of {claimed.md5}"
        if not allow_unknown:
            raise UserError(
                f"{problem}: the download is damaged or it is another file; download {claimed.url} "
                "again, or pass --allow-unknown-md5 if you mean this file"
            )
        log(f"warning  {problem}, converted because of --allow-unknown-md5")
    return known[md5].name if md5 in known else None


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with open(file, "rb") as opened:
            head = opened.read(9)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check the path") from None
    # safetensors: the header's length in eight bytes, then its JSON.
    if head[8:] == b"{" and not head.startswith(ZIP_MAGIC):
        return read_safetensors(file)
    return read_torch_file(file)


@contextlib.contextmanager
def _writing(path: Path):
    """Turn a failure to write `path` into a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); choose another --output or make room"
        ) from None


def _save_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata=None) -> None:
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)  # the library makes a file of its own that only its owner can read


def _save_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(
            "a .pth file is written by PyTorch, which is not installed; run "
            "pip install '.[convert]' or let --output end in .safetensors"
        ) from None
    # Through an open file, so that the name of the temporary file does not enter the archive.
    with open(path, "wb") as file:
        torch.save(OrderedDict((n, torch.from_numpy(t)) for n, t in tensors.items()), file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weights_conversion.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", required=True, help="checkpoint file, or folder holding model.safetensors"
    )
    parser.add_argument("--output", required=True, help="stem of the two files to write")
    parser.add_argument("--reverse", action="store_true", help="from our weights to a checkpoint")
    parser.add_argument("--layout", choices=sorted(TO), help="layout to write with --reverse")
    parser.add_argument(
        "--allow-unknown-md5",
        action="store_true",
        help="convert a file that has an official name but not the official MD5",
    )
    return parser


def main(argv=None) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.reverse != (arguments.layout is not None):
        parser.error("--reverse and --layout go together")
    with exit_on_user_error():
        if arguments.reverse:
            reverse(arguments.source, arguments.output, arguments.layout)
        else:
            convert(
                arguments.source,
                arguments.output,
                allow_unknown_md5=arguments.allow_unknown_md5,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
