"""Downloads are complete and checked, or not there; what a cut left is continued."""

import errno
import hashlib
import random
import shutil
import urllib.request

import filelock
import pytest

from pgpsam_jax.errors import UserError, as_user_error
from tests.support.file_server import serving
from weights_conversion import download as module
from weights_conversion.download import download

CONTENT = random.Random(0).randbytes(3 * 10**5)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "weights.pth"


def only(target):
    """Whether the folder holds the whole file and nothing else."""
    return target.read_bytes() == CONTENT and [p.name for p in target.parent.iterdir()] == [
        target.name
    ]


@pytest.mark.parametrize("path", ["file", "moved"])
def test_a_file_is_downloaded(path, target):
    with serving(CONTENT) as server:
        download(f"{server.url}/{path}", target, size=len(CONTENT), digests={"sha256": SHA})
    assert only(target)


def test_a_cut_is_continued_where_it_was(target):
    with serving(CONTENT, cuts=[10**5, 2 * 10**5]) as server:
        download(f"{server.url}/file", target, digests={"sha256": SHA, "md5": ""})
        assert server.asked == [None, "bytes=100000-", "bytes=200000-"]
    assert only(target)


def test_a_later_command_continues(target, monkeypatch):
    monkeypatch.setattr(module, "_TRIES", 2)
    with serving(CONTENT, cuts=[10**5, 10**5, 10**5, 10**5]) as server:
        with pytest.raises(UserError, match="run the same command again to continue"):
            download(f"{server.url}/file", target)
        assert not target.exists()
        server.cuts.clear()
        download(f"{server.url}/file", target)
        assert server.asked[-1] == "bytes=100000-"
    assert only(target)


@pytest.mark.parametrize(
    "settings", [{"ranges": False}, {"etag": ""}, {"etag": 'W/"1"'}, {"shift": 5}]
)
def test_without_a_promise_of_the_same_bytes_it_starts_again(settings, target):
    with serving(CONTENT, cuts=[10**5], **settings) as server:
        download(f"{server.url}/file", target, digests={"sha256": SHA})
    assert only(target)


def test_a_file_that_changed_in_between_is_not_glued(target, monkeypatch):
    monkeypatch.setattr(module, "_TRIES", 1)
    with serving(CONTENT[::-1], cuts=[10**5, 10**5], etag='"0"') as server:
        with pytest.raises(UserError):
            download(f"{server.url}/file", target)
        server.content, server.etag = CONTENT, '"1"'
        server.cuts.clear()
        download(f"{server.url}/file", target)
    assert only(target)


def test_a_complete_part_is_taken(target, monkeypatch):
    """As after a computer that stopped between the last byte and the new name."""
    with serving(CONTENT) as server:
        url = f"{server.url}/file"
        part = target.with_name("weights.pth.part")
        part.write_bytes(CONTENT)
        module.write_json(module._state(part), {"url": url, "validator": server.etag})
        download(url, target, digests={"sha256": SHA})
    assert only(target)


def test_wrong_content_is_removed(target):
    with (
        serving(CONTENT[:-1] + b"?") as server,
        pytest.raises(UserError, match="instead of " + SHA),
    ):
        download(f"{server.url}/file", target, digests={"sha256": SHA})
    assert not any(p.suffix in (".pth", ".part") for p in target.parent.iterdir())


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"kind": "text/html; charset=utf-8"}, None, "answers with a web page"),
        ({"status": 404}, None, "answers 404 Not Found"),
        ({}, 7, "holds 300,000 bytes instead of 7: it is another file"),
    ],
)
def test_other_answers_are_said(settings, size, message, target):
    with serving(CONTENT, **settings) as server, pytest.raises(UserError, match=message):
        download(f"{server.url}/file", target, size=size)
    assert not target.exists()


def test_an_encrypted_address_does_not_lead_to_a_plain_one():
    handler = module._Redirects()
    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(UserError, match="not encrypted; not followed"):
        handler.redirect_request(request, None, 302, "", {}, "http://example.org/a")


def test_too_little_room_is_seen_before(target, monkeypatch):
    usage = shutil.disk_usage(target.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with serving(CONTENT) as server, pytest.raises(UserError, match="has 0 MiB free"):
        download(f"{server.url}/file", target)


def test_a_full_disk_leaves_what_can_be_continued(target, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, block):
            if self.file.tell() >= 10**5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(block)

    monkeypatch.setattr(module, "_BLOCK", 10**5)
    with serving(CONTENT) as server:
        with monkeypatch.context() as patch:
            patch.setattr(module, "open", lambda *a: Full(open(*a)), raising=False)
            with pytest.raises(OSError) as caught:
                download(f"{server.url}/file", target)
        assert "space" in str(as_user_error(caught.value))
        download(f"{server.url}/file", target, digests={"sha256": SHA})
        assert server.asked[-1] == "bytes=100000-"
    assert only(target)


def test_two_at_once_do_not_write_one_file(target):
    with filelock.FileLock(f"{target}.part.lock"), serving(CONTENT) as server:
        with pytest.raises(UserError, match="another process downloads"):
            download(f"{server.url}/file", target)
        assert not server.asked


def test_without_a_network_it_says_so(target):
    with serving(CONTENT) as server:
        url = f"{server.url}/file"
    with pytest.raises(UserError, match=r"cannot be downloaded .* once there is a network"):
        download(url, target)
