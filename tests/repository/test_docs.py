"""The documentation: links resolve, the paths that it names exist, and the README is short."""

import re
import subprocess

import pytest

from pgpsam_jax.config import default_config
from tests.support.places import REPOSITORY

README_LINES = 120
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
).stdout.splitlines()
FILES = [name for name in TRACKED if (REPOSITORY / name).is_file()]
PAGES = [name for name in FILES if name.endswith(".md")]
# The others name files that are gone, or that the reader is to write.
CURRENT = [name for name in PAGES if name not in ("CHANGELOG.md", "CONTRIBUTING.md")]
TEXTS = [name for name in FILES if name.endswith((".py", ".sh", ".ipynb", ".toml", ".md", "run"))]
TOP = "|".join(re.escape(name) for name in sorted({n.split("/")[0] for n in FILES if "/" in n}))
_PATH = re.compile(rf"(?<![\w./-])((?:{TOP})/[\w./*-]*\w/?)")
_SOURCE = re.compile(r"`(\w+\.(?:py|sh))(?::\w+)?`")
_MODULE = re.compile(r"python3? -m ((?:pgpsam_jax|experiments|weights_conversion)[\w.]*)")

pytestmark = pytest.mark.skipif(not FILES, reason="needs a git checkout")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def missing(target: str, anchor: str) -> bool:
    """Whether a page or file, or the anchor in it, does not exist."""
    if not (REPOSITORY / target).exists():
        return True
    return bool(anchor) and anchor not in anchors(target)


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        target = target.resolve().relative_to(REPOSITORY).as_posix()
        if missing(target, anchor):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", CURRENT)
def test_named_paths_exist(page):
    """Paths of the repository in text, commands and tables; file names between backticks."""
    text, names = read(page), {name.rsplit("/", 1)[-1] for name in FILES}
    paths = [path.rstrip("/") for path in _PATH.findall(text) if "NAME" not in path]
    wrong = [path for path in paths if not list(REPOSITORY.glob(path))]
    wrong += [name for name in _SOURCE.findall(text) if name not in names]
    for module in _MODULE.findall(text):
        path = REPOSITORY / module.replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            wrong.append(module)
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_named_fields_exist(page):
    """Fields of the configuration, `data.window` between backticks or after `--config.`."""
    fields = default_config().to_dict()
    sections = "|".join(name for name, section in fields.items() if isinstance(section, dict))
    pattern = rf"(?:`|--config\.|--set )({sections})\.(\w+)(?=[`= ])"
    named = re.findall(pattern, read(page))
    assert [f"{a}.{b}" for a, b in named if b not in {"py", "txt", "safetensors", *fields[a]}] == []


def test_documents_named_in_code_exist():
    """Pages and anchors below docs/; no section number of a document elsewhere."""
    wrong = []
    for name in TEXTS:
        for path, anchor in re.findall(r"\b(docs/[\w/-]+\.md)(?:#([\w-]+))?", read(name)):
            if "NAME" not in path and missing(path, anchor):
                wrong.append(f"{name}: {path}#{anchor}")
        if name.endswith(".py"):
            wrong += [f"{name}: {hit}" for hit in re.findall(r"\w+\.md\s+[\d§]\S*", read(name))]
    assert not wrong


def test_every_page_is_in_the_index():
    index = read("docs/README.md")
    pages = {name for name in PAGES if re.fullmatch(r"docs/\w+\.md", name)} - {"docs/README.md"}
    assert {name for name in pages if f"({name.removeprefix('docs/')})" not in index} == set()
