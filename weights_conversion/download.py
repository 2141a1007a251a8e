"""Downloads a large file: resumed after a cut, checked, complete or not there."""

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import filelock
from tqdm import tqdm

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import read_record, write_json

_BLOCK = 1 << 20
_TRIES = 5  # connections in a row that bring nothing
_TIMEOUT = 30  # seconds without a byte
_AGAIN = "run the same command again to continue"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from an encrypted address to a plain one."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise UserError(
                f"{req.full_url} leads to {newurl}, which is not encrypted; not followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, target: Path, *, size: int | None = None, digests=None) -> None:
    """Downloads `url` to `target`.

    What a cut connection left in `<target>.part` is continued if the server still has the same
    file.

    Args:
      url: http or https.
      target: file to write; its folder must exist.
      size: in bytes, if known.
      digests: name in `hashlib` -> hex digest; empty ones are not known.

    Raises:
      UserError: the server has no such file or another one, the disk is full, the connection fails
        again and again, or another process downloads the same file.
    """
    part = target.with_name(f"{target.name}.part")
    lock = filelock.FileLock(f"{part}.lock")
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process downloads {target}; wait for it") from None
    with held:
        _download(url, part, size)
        _state(part).unlink(missing_ok=True)
        for name, (found, wanted) in _digests(part, digests or {}).items():
            if found != wanted:
                part.unlink()
                raise UserError(
                    f"{url} gave a file with {name.upper()} {found} instead of {wanted}, which was "
                    "removed; try again, and do not use it if that does not help"
                )
        part.replace(target)
    Path(lock.lock_file).unlink(missing_ok=True)


def _digests(file: Path, wanted: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Returns name -> (digest of the file, wanted one) for those that are known."""
    found = {}
    for name, digest in wanted.items():
        if digest:
            with open(file, "rb") as opened:
                found[name] = hashlib.file_digest(opened, name).hexdigest(), digest
    return found


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _download(url: str, part: Path, size: int | None) -> None:
    idle = 0
    while idle < _TRIES:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _one_connection(url, part, size):
                return
            reason = "the connection was cut"
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
        ) as e:
            if isinstance(e, urllib.error.HTTPError):
                raise UserError(f"{url} answers {e.code} {e.reason}; {_AGAIN} later") from None
            reason = str(getattr(e, "reason", e)) or type(e).__name__
        idle = 0 if part.is_file() and part.stat().st_size > before else idle + 1
    raise UserError(f"{url} cannot be downloaded ({reason}); {_AGAIN} once there is a network")


def _one_connection(url: str, part: Path, size: int | None) -> bool:
    """Fetches as much as one connection brings; returns whether the file is complete."""
    headers = {"User-Agent": "pgpsam_jax", "Accept-Encoding": "identity"}
    state = read_record(_state(part), missing={}, damaged={})
    start = part.stat().st_size if part.is_file() and state.get("url") == url else 0
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": state["validator"]}
    opener = urllib.request.build_opener(_Redirects)
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing follows, or what is here is no part of it
            part.unlink()
            return False
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(
                f"{url} answers with a web page, not a file; the address may have moved"
            )
        if answer.status != 206:
            start = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()  # another part than was asked for must not be glued
            return False
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        if size is not None and total not in (None, size):
            raise UserError(f"{url} holds {total:,} bytes instead of {size:,}: it is another file")
        _check_room(part, (total or size or 0) - start)
        # A weak validator does not promise the same bytes.
        validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        _state(part).unlink(missing_ok=True)
        if validator and not validator.startswith("W/"):
            write_json(_state(part), {"url": url, "validator": validator})
        with (
            open(part, "r+b" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as progress,
        ):
            file.seek(start)
            while block := answer.read(_BLOCK):
                file.write(block)
                progress.update(len(block))
            end = file.tell()
    return end == (total or size or end)


def _check_room(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < needed:
        raise UserError(
            f"{part.parent} has {free / 2**20:.0f} MiB free, the download needs another "
            f"{needed / 2**20:.0f} MiB; make room, or set XDG_CACHE_HOME to another disk"
        )
