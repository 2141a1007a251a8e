"""The list of all configuration fields for `--help`, with the comments of their definitions."""

import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator

from pgpsam_jax.config import defaults
from pgpsam_jax.config.augmentation import AugmentConfig
from pgpsam_jax.config.optimizer import OptimConfig
from pgpsam_jax.config.serialization import flatten

_ATTRIBUTE = re.compile(r"([a-z_0-9, ]+): (.*)", re.DOTALL)


def describe_fields(width: int = 100) -> str:
    """Returns one entry per field: `--config.model.k=4`, with its comment."""
    comments = field_comments()
    entries = []
    for field, value in flatten(defaults.default_config().to_dict()).items():
        entry = f"  --config.{field}={_text(value)}"
        comment = comments.get(field, "")
        if len(entry) + len(comment) + 3 > width or not comment:
            comment = textwrap.indent(textwrap.fill(comment, width - 8), " " * 8)
            entries.append("\n".join(filter(None, [entry, comment])))
        else:
            entries.append(f"{entry:44}  {comment}")
    return "\n".join(entries)


def _text(value: object) -> str:
    return ",".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value)


def field_comments() -> dict[str, str]:
    """Returns field -> comment, read from `default_config` and the docstrings of its sections."""
    comments = _assignments(inspect.getsource(defaults.default_config))
    for section, owner in (("augment", AugmentConfig), ("optim", OptimConfig)):
        for names, text in _attributes(owner):
            comments |= {f"{section}.{name}": text for name in names}
    return comments


def _assignments(source: str) -> dict[str, str]:
    """The comment after `config.x = ...`, or else the lines of comment before it."""
    source = textwrap.dedent(source)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found: dict[str, str] = {}
    above: list[str] = []
    for number, line in enumerate(source.splitlines(), 1):
        comment = comments.get(number)
        if comment and line.lstrip().startswith("#"):
            above.append(comment)
            continue
        if match := re.match(r"config\.([\w.]+) = ", line.lstrip()):
            found[match[1]] = comment or " ".join(above)
        above = []
    return found


def _attributes(owner: type) -> Iterator[tuple[list[str], str]]:
    """(names, text) of each entry under "Attributes:" in a docstring."""
    _, _, text = (inspect.getdoc(owner) or "").partition("Attributes:\n")
    for entry in re.split(r"\n(?=  \w)", text):
        if match := _ATTRIBUTE.fullmatch(" ".join(entry.split())):
            yield match[1].split(", "), match[2]
