"""Spellings of a table: Markdown, LaTeX and HTML, with everything in it that needs escaping."""

import html.parser
import re
import shutil
import subprocess

import pytest

from pgpsam_jax.results.grid import read_grid
from pgpsam_jax.results.tables.text import Table, to_html, to_latex, to_markdown
from tests.support.grid_folder import grid_tables, write_grid

AWKWARD = Table(
    r"50 % of `a_b` & <c>",
    ["row", "a|b", "95 % CI"],
    [["x_1 & {y} #2 <b> ~^\\ $5 *z*", "81.20 ± 0.45", "-1.20 to +0.35"], ["\u03b1 ≥ 2", "-", ""]],
    ["n < 50: 100 % of `x|y`, see <script> and 5*3"],
)


def test_markdown_is_escaped_and_aligned():
    lines = to_markdown(AWKWARD).splitlines()
    assert lines[0] == r"## 50 % of `a_b` & \<c>"
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
    assert r"a\|b" in rows[0] and rows[1].endswith("-: |") and rows[1].startswith("| ---")
    assert r"x_1 & {y} #2 \<b> \~^\\ \$5 \*z\*" in rows[2]
    assert lines[-1] == r"- n < 50: 100 % of `x|y`, see \<script> and 5\*3"


def test_latex_is_escaped():
    text = to_latex(AWKWARD)
    assert (
        r"x\_1 \& \{y\} \#2 $<$b$>$ \textasciitilde{}\textasciicircum{}\textbackslash{} \$5" in text
    )
    assert r"\caption{50 \% of \texttt{a\_b} \& $<$c$>$}" in text
    assert r"81.20 $\pm$ 0.45 & $-$1.20 to +0.35 \\" in text and r"$\alpha$ $\ge$ 2 & - &" in text
    for command in ("toprule", "midrule", "bottomrule"):
        assert text.count(rf"\{command}") == 1
    begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", text) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended) and "tabular" in begun
    bare = text.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}") and text.isascii()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(tmp_path):
    rows = {"full": {}, "none": {"model.cfm": False}}
    path = write_grid(tmp_path / "g", rows, (0, 1), labels={"none": "no_CFM & 5 % \u03b1"})
    body = [to_latex(table) for table in [AWKWARD, *grid_tables(read_grid(path))]]
    start = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
    (tmp_path / "t.tex").write_text(start + "\n".join(body) + "\n\\end{document}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


class Reader(html.parser.HTMLParser):
    """Opened and closed tags, and the text between."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs).get("scope")))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_html_is_semantic_and_escaped():
    reader = Reader()
    reader.feed(to_html(AWKWARD))
    assert reader.open == []
    kinds = {tag for tag, _ in reader.tags}
    assert kinds == {*"table caption thead tbody tr th td ul li code".split()}
    assert reader.tags.count(("th", "col")) == 3 and reader.tags.count(("th", "row")) == 2
    text = "".join(reader.words)
    assert "x_1 & {y} #2 <b> ~^\\ $5 *z*" in text and "see <script> and" in text
