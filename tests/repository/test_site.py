"""The documentation as a site: it builds without a warning, and no link of its pages is dead."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support.places import REPOSITORY

pytest.importorskip("mkdocs", reason="needs the extra docs")


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "id":
                self.anchors.add(value)


def test_no_link_is_dead(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert {site / name for name in ("index.html", "repository/CONTRIBUTING/index.html")} <= {
        *pages
    }
    dead = []
    for path, page in pages.items():
        for link in page.links:
            if ":" in link:  # to other sites
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else ()
            if not target.is_file() or (anchor and anchor not in known):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead
