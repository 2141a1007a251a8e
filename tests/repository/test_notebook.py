"""The example notebook runs from top to bottom, and is committed as it was run."""

import ast
import dataclasses
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure
from nbclient import NotebookClient

import pgpsam_jax
from pgpsam_jax.data import dataset
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.inference.trained_run import TrainedRun
from pgpsam_jax.methods import build
from pgpsam_jax.models.segmenter import to_input
from tests.support.launcher import KNOWING, environment
from tests.support.places import REPOSITORY
from tests.support.ready_run import ready_run
from tests.support.small_run import config_for, write_data

NOTEBOOK = REPOSITORY / "examples" / "segment_volume.ipynb"


def printed(notebook) -> list[str]:
    """What each code cell wrote to stdout."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [[o for o in cell.outputs if o.get("name") == "stdout"] for cell in cells]
    return ["".join(output.text for output in own) for own in outputs]


def pictures(notebook) -> int:
    """How many of the outputs are pictures."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return sum("image/jpeg" in output.get("data", {}) for output in outputs)


def blank():
    """The notebook without outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return notebook


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The data of a small run in the folder `run` beside them, which the notebook is to show."""
    monkeypatch.setenv("PGPSAM_RUN", str(tmp_path / "run"))
    monkeypatch.delenv("PGPSAM_VOLUME", raising=False)
    return write_data(tmp_path / "data")


@dataclasses.dataclass
class Bright:
    """In the place of a trained network: the two balls by their brightness."""

    preprocessing: Preprocessing

    def __call__(self, volume):
        return np.digitize(volume.array, (95, 165)).astype(np.uint8)


class Sketched(TrainedRun):
    """A run of which only the shapes of what the model computes are known: nothing compiles."""

    def passes(self, volume, slices):
        graphdef, *states = build.abstract_model(self.config.model, len(self.label_names))

        def passes(images, *states):
            return nnx.merge(graphdef, *states).passes(to_input(images))

        shapes = jax.eval_shape(passes, self.inputs(volume, slices), *states)
        return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


@pytest.fixture
def sketched(root, monkeypatch):
    config = build.resolve_method_defaults(config_for(root, model__cfm=False))
    config.data.axis = dataset.axis_of(config.data, dataset.find_split(config.data).train)
    names = ("background", "liver", "spleen")
    network = Bright(Preprocessing.from_config(config.data, config.model.image_size))

    def load_run(workdir):
        return Sketched(Path(workdir), config, names, network)

    monkeypatch.setattr(pgpsam_jax, "load_run", load_run)


def check(text):
    """What the small run prints."""
    assert "1 liver, 2 spleen" in text and "c.nii.gz: (24, 20, 10) voxels" in text
    for name in ("liver", "spleen"):
        assert text.count(f"\n{name}") == 2  # a volume and a Dice
    assert "pass 2: dense prompt (4, 4, 32)" in text


def test_the_code_runs(sketched, monkeypatch, capsys):
    """Cell by cell as a kernel does it, but for the lines to the kernel itself."""
    monkeypatch.chdir(NOTEBOOK.parent)
    names, pages, orders = {}, [], []
    for cell in blank().cells:
        if cell.cell_type != "code":
            continue
        lines = cell.source.splitlines()
        orders += [line for line in lines if line.startswith("%")]
        tree = ast.parse("\n".join(line for line in lines if not line.startswith("%")))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
        opened = {names["plt"].figure(number) for number in names["plt"].get_fignums()}
        pages.append(len(opened | {shown}) if isinstance(shown, Figure) else len(opened))
        names["plt"].close("all")
    check(capsys.readouterr().out)
    assert sum(pages) == 2 and pages[-1] == 1
    assert orders[0] == "%matplotlib inline" and '["jpeg"]' in orders[1]


@pytest.mark.slow
def test_the_notebook_runs(root, tmp_path, monkeypatch):
    """With a model, and a kernel."""
    (tmp_path / "run").mkdir()
    ready_run(root, tmp_path / "run", evaluated=False, model__cfm=False)
    unrun = blank()
    monkeypatch.setenv("PYTHONPATH", environment(1, KNOWING)["PYTHONPATH"])  # the small encoder
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(unrun, timeout=300, resources=place).execute()  # raises if a cell does
    check("\n".join(printed(unrun)))
    assert pictures(unrun) == 2


def test_the_committed_outputs():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 400_000
    assert pictures(notebook) == 2 and "pancreas" in "\n".join(printed(notebook))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("private", ["/home/", "/root/", "/tmp/", "/Users/"])
def test_no_machine_paths(private):
    assert private not in NOTEBOOK.read_text(encoding="utf-8")
