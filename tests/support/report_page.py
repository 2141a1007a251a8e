"""What a page of the report is made of, and what must hold of every page and its figures."""

import re
from html.parser import HTMLParser

from matplotlib.image import imread

from tests.support.grid_folder import read_csv

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a page is made of; fails where a tag is closed that is not the open one."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def check_self_contained(path):
    """No file, host or script is asked for; links lead into the page or to files that are there."""
    page = Page(path)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    anchors = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
        href = attributes.get("href", "#")
        assert href == "#" or href[1:] in anchors or (path.parent / href).exists(), href
    assert all(image["alt"] for image in page.of("img"))
    style = re.search(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert not re.search(r"url\(|@import|http", style)
    return page


def check_figures(folder):
    """Every figure in every format, readable; returns the stems."""
    stems = {path.stem for path in folder.iterdir()}
    assert {path.name for path in folder.iterdir()} == {
        f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf", "csv")
    }
    for stem in stems:
        assert imread(folder / f"{stem}.png").std() > 0.01
        assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
        assert read_csv((folder / f"{stem}.csv").read_text())
    return stems
