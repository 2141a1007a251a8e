"""Adds the files outside of docs/ that pages link to, so that no link of the site is dead.

Links stay relative to the repository, as code hosts need them, whatever its address. A linked
Markdown file becomes a page below `repository/`, a Python file a page that shows it; others are
copied.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
_UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def _target(source: str, link: str) -> str | None:
    """The linked file by its path in the repository; None for other links."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if (ROOT / path).is_file() else None


def _uri(path: str) -> str:
    """Path on the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}.md" if path.endswith(".py") else f"repository/{path}"


def on_files(files, config):
    sources = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + ["README.md"]
    for source in sources:  # grows
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".py"):
            listing = f"{_UNSEARCHED}# {source}\n\n```python\n{text}```\n"
            files.append(File.generated(config, _uri(source), content=listing))
        elif not source.startswith("docs/"):
            files.append(File.generated(config, _uri(source), abs_src_path=str(ROOT / source)))
        if source.endswith(".md"):
            found = [_target(source, link) for link in _LINK.findall(text)]
            outside = [path for path in found if path and not path.startswith("docs/")]
            sources += dict.fromkeys(path for path in outside if path not in sources)


def on_page_markdown(markdown, page, **_):
    uri = page.file.src_uri
    source = uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"

    def relative(match):
        path = _target(source, match[0])
        return posixpath.relpath(_uri(path), posixpath.dirname(uri)) if path else match[0]

    return _LINK.sub(relative, markdown)
