"""The intermediates of PGP-SAM, what is computed from them, and their pictures."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.inference.settings import PLAIN
from pgpsam_jax.models.pgpsam.model import Pass
from pgpsam_jax.models.pgpsam.ppr import PrototypeRefinement, select_inter
from pgpsam_jax.report.figures import picture as drawing
from pgpsam_jax.report.figures.csv_rows import read_columns, write_rows
from pgpsam_jax.report.prototypes import charts, collect, pictures
from pgpsam_jax.results import runs
from tests.support import tiny_method
from tests.support.ready_run import ready_run
from tests.support.small_pgpsam import build, inputs_for, small
from tests.support.small_run import write_data

SWITCHES = {
    "all": dict(alpha=3, k=5, stage_taps=(1,)),
    "no ppr": dict(ppr=False, stage_taps=(1, 0)),
    "no ppg": dict(ppr=False, ppg=False, stage_taps=(1,)),
}


@functools.cache
def traced(name):
    """(configuration, compiled function of arrays to passes, its arguments), random parameters.

    The outputs of the forward pass are those of its first pass and its last.
    """
    config = small((32, 48), 3, **SWITCHES[name])
    graphdef, state = nnx.split(build(config)[0])

    def run(state, images):
        model, passes = nnx.merge(graphdef, state), []
        found = model.decode_passes
        model.decode_passes = lambda encoded: passes.extend(found(encoded)) or passes
        outputs = model(images)
        assert outputs["bootstrap"] is passes[0].logits
        assert outputs["final"] is passes[-1].logits
        return passes

    return config, jax.jit(run), (state, inputs_for(config))


@pytest.mark.parametrize("name", SWITCHES)
def test_passes_of_the_forward_pass_and_their_shapes(name):
    config, run, arguments = traced(name)
    passes = jax.eval_shape(run, *arguments)
    assert len(passes) == 1 + (len(config.stage_taps) if config.ppr else 1)
    b, (h, w), c, classes = 2, config.sam.encoder.grid, 32, config.num_classes
    inter = config.alpha * classes
    for place, one in enumerate(passes):
        assert one.feature.shape == one.dense.shape == (b, h, w, c)
        assert one.logits.shape == (b, 4 * h, 4 * w, classes)
        assert one.class_feature.shape == (b, h, w, classes)
        assert one.sparse.shape == (b, classes if config.ppg else 0, c)
        if config.ppg:
            assert one.intra.shape == (b, classes, c) and one.inter.shape == (b, inter, c)
        else:
            assert one.intra is one.inter is None
        if config.ppr and place:
            tokens = classes * (config.k + 1)
            assert one.picks.shape == (b, classes, config.k)
            assert one.class_weights.shape == one.query_weights.shape == (b, tokens, h * w)
        else:
            assert one.picks is one.class_weights is one.query_weights is None


def test_attention_sums_to_one_and_picks_are_the_nearest():
    config, run, arguments = traced("all")
    passes = jax.tree.map(np.asarray, run(*arguments))
    for before, one in itertools.pairwise(passes):
        for weights in (one.class_weights, one.query_weights):
            np.testing.assert_allclose(np.sum(weights, -1), 1, rtol=2e-6)
        picks = select_inter(before.intra, before.inter, config.k)
        np.testing.assert_array_equal(one.picks, picks)
        assert np.abs(one.intra - before.intra).max() > 0  # refined by the stage
        untouched = np.setdiff1d(np.arange(one.inter.shape[1]), one.picks[0])
        np.testing.assert_array_equal(one.inter[0, untouched], before.inter[0, untouched])


# What the pictures are drawn from.


def part(truth):
    image = np.zeros(truth.shape, np.float32)
    return collect.Slice("a", 3, image, truth, (1.0, 1.0))


def fake_look(truth, weights, picks):
    """A look at one slice and one stage of a model with 2 classes and k = 1, on a 4 x 4 grid."""
    n, k = len(picks), 2
    rng = np.random.default_rng(0)
    arrays = {
        "feature": np.zeros((n, 4, 4, 5)),
        "intra": rng.normal(size=(n, k, 5)),
        "inter": rng.normal(size=(n, 6, 5)),
        "dense": rng.normal(size=(n, 4, 4, 5)),
    }
    names = ("sparse", "logits", "class_feature", "picks", "class_weights", "query_weights")
    first = Pass(**arrays, **dict.fromkeys(names))
    refined = first._replace(picks=picks, class_weights=weights, query_weights=weights)
    slices = [part(truth)] * n
    passes, mixing = [first, refined], [(0.4, 0.6)]
    return collect.Probe(
        ("background", "x"), slices, [0], passes, mixing, mix_start=0.5, image_size=16
    )


def one_hot_look():
    """Class 1 fills the top left quarter; its own token looks at token (0, 1)."""
    truth = np.zeros((16, 16), np.uint8)
    truth[:8, :8] = 1
    weights = np.zeros((2, 4, 16))
    weights[:, :, 15] = 1
    weights[:, 2] = np.eye(16)[1]  # token k (k + 1) = 2 is class 1's own
    return fake_look(truth, weights, np.array([[[0], [4]], [[0], [5]]]))


def test_shares_count_the_tokens_that_touch_the_organ():
    rows = collect.share_rows(one_hot_look())
    assert {(row["map"], row["class"]) for row in rows} == {("W_c", "x"), ("W_q", "x")}
    assert all(row["attention"] == 1 and row["tokens"] == 0.25 for row in rows)


def test_pick_frequencies():
    rows = collect.pick_rows(one_hot_look())
    picked = {(row["class"], row["inter"]): row["picked"] for row in rows if row["picked"]}
    assert picked == {("background", 0): 1, ("x", 4): 0.5, ("x", 5): 0.5}


def test_cosines_against_numpy():
    one = one_hot_look()
    rows = collect.similarity_rows(one)
    assert {row["prototypes"] for row in rows} == {"learned", "refined"}
    intra, inter = one.passes[0].intra, one.passes[0].inter
    for row in rows:
        k, others = one.names.index(row["class"]), {"intra": intra, "inter": inter}[row["with"]]
        pairs = zip(intra[:, k], others[:, row["index"]], strict=True)
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
        assert row["cosine"] == pytest.approx(np.mean(cosines), abs=1e-3)
        lengths = np.linalg.norm(intra[:, k], axis=-1)
        assert row["length"] == pytest.approx(lengths.mean(), rel=1e-3)


def test_an_alarm_where_sparse_prompts_are_all_one(tmp_path):
    one = one_hot_look()
    assert pictures.prompt_warning(tmp_path) is None  # nothing was looked at
    same = np.ones((2, 2, 5)) * [[[1.0], [3.0]]]  # of other lengths, which do not matter
    for sparse, alike in ((same, True), (np.random.default_rng(1).normal(size=(2, 2, 5)), False)):
        passes = [look._replace(sparse=sparse) for look in one.passes]
        rows = collect.prompt_rows(dataclasses.replace(one, passes=passes))
        assert [(row["pass"], row["class"], row["other"]) for row in rows] == [
            (0, "background", "x"),
            (1, "background", "x"),
        ]
        assert (rows[-1]["cosine"] == 1) == alike
        write_rows(tmp_path / "prototype_prompts.csv", rows)
        said = pictures.prompt_warning(tmp_path)
        if alike:
            assert said.startswith("The sparse prompts of 1 of 1 pairs of classes are nearly")
            assert "for example background and x" in said
        else:
            assert said is None


def test_tables_come_back_as_they_were_written(tmp_path):
    rows = collect.attention_rows(one_hot_look())
    write_rows(tmp_path / "t.csv", rows)
    table = read_columns(tmp_path / "t.csv")
    own = (table["class"] == "x") & (table["map"] == "W_c")
    grid = np.stack([table[f"c{i}"][own] for i in range(4)], axis=1)
    assert np.array_equal(grid, np.eye(16)[1].reshape(4, 4))


def test_order_of_the_picked():
    first = np.array([[0, 0, 1, 0, 0], [1, 0, 1, 0, 0]])
    second = np.array([[0, 0, 0, 0, 0.5], [0, 0, 0, 1, 0.5]])
    assert charts.pick_order([first, second]) == [2, 0, 4, 3, 1]


# The pictures of a run.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), cases=("a", "b", "c"))


class Nothing:
    """Finds no organ: the pictures need cases that were scored, and no scores."""

    preprocessing, oracle, settings = Preprocessing(8, (0, 1)), False, PLAIN

    def __call__(self, volume):
        return np.zeros(volume.array.shape, np.uint8)


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
    """Of a method that has no prototypes: what is made with it comes before those, or is drawn."""
    with tiny_method.known():
        yield ready_run(
            root, tmp_path_factory.mktemp("run"), predictor=Nothing(), model__name=tiny_method.NAME
        )


class Prototypes:
    """In the place of a trained model with 3 classes, alpha = k = 2 and one stage."""

    def __init__(self):
        sizes = dict(mix_start=0.5, norm=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.ppr = [PrototypeRefinement(8, 3, 2, (4, 4), **sizes)]

    def passes(self, volume, slices):
        """As `TrainedRun.passes`, of which it takes the place, too."""
        rng, n = np.random.default_rng(0), len(slices)
        shapes = dict(intra=(3, 8), inter=(6, 8), sparse=(3, 8))
        shapes |= dict(dense=(4, 4, 8), feature=(4, 4, 8), class_feature=(4, 4, 3))
        shapes |= dict(logits=(16, 16, 3), class_weights=(9, 16), query_weights=(9, 16))
        first = {name: rng.random((n, *shape)) for name, shape in shapes.items()}
        for name in ("class_weights", "query_weights"):
            first[name] /= first[name].sum(-1, keepdims=True)
        second = first | {"picks": np.tile([0, 5], (n, 3, 1))}
        none = dict.fromkeys(("picks", "class_weights", "query_weights"))
        return [Pass(**first | none), Pass(**second)]


CHARTS = ("shares", "similarity", "picks", "mixing")
RASTER = {"dense": "dense", "class_attention": "attention", "query_attention": "attention"}


def pixels_only(figure, target, kind, dpi):
    """In the place of `drawing._save`: vectors, which take most of the time, are left out."""
    if kind == "png":
        figure.savefig(target, format=kind, dpi=20)
    elif hasattr(target, "write"):
        target.write(b"<svg/>")
    else:
        target.write_bytes(b"%PDF")


@pytest.fixture
def given_passes(monkeypatch):
    monkeypatch.setattr(drawing, "_save", pixels_only)
    model = Prototypes()
    monkeypatch.setattr("pgpsam_jax.inference.trained_run.TrainedRun.model", model)
    monkeypatch.setattr(
        "pgpsam_jax.inference.trained_run.TrainedRun.passes", lambda _, *of: model.passes(*of)
    )


def test_pictures_of_a_run(workdir, tmp_path, given_passes):
    check_pictures(workdir, tmp_path)


def test_pictures_of_volumes_of_different_sizes(tmp_path, given_passes):
    """Crops around an organ, as hippocampi are handed out."""
    root = write_data(tmp_path / "data", "abcd")
    for path in (root / "images" / "d.nii.gz", root / "labels" / "d.nii.gz"):
        nib.save(nib.load(path).slicer[:, 2:], path)
    (root / "split.json").write_text('{"train": ["a", "b"], "test": ["c", "d"]}')
    (tmp_path / "run").mkdir()
    with tiny_method.known():
        options = dict(predictor=Nothing(), model__name=tiny_method.NAME)
        run = runs.read_run(ready_run(root, tmp_path / "run", **options))
        made = pictures.prototype_pictures(run, tmp_path)
    assert [p.stem.removeprefix("prototype_") for p in made] == [*RASTER, *CHARTS]
    assert set(read_columns(tmp_path / "prototype_dense.csv")["case"]) == {"c", "d"}


@pytest.mark.slow
def test_pictures_of_a_trained_model(root, tmp_path, monkeypatch):
    for dots in ("_FILE_DPI", "_PAGE_DPI"):  # most of the time goes into them
        monkeypatch.setattr(drawing, dots, 20)
    settings = dict(model__alpha=2, model__k=2, model__stage_taps=(1,))
    workdir = ready_run(root, tmp_path / "run", predictor=Nothing(), **settings)
    check_pictures(workdir, tmp_path)


def check_pictures(workdir, tmp_path):
    made = pictures.prototype_pictures(runs.read_run(workdir), tmp_path)
    by_stem = {p.stem.removeprefix("prototype_"): p for p in made}
    assert list(by_stem) == [*RASTER, *CHARTS]
    for name, picture in by_stem.items():
        for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
            assert (tmp_path / f"prototype_{name}.{kind}").read_bytes().startswith(magic)
        assert picture.title and picture.caption.endswith(".")
        assert (picture.dark is None) == (name in RASTER)
    tables = {path.stem for path in tmp_path.glob("*.csv")}
    assert tables == {f"prototype_{name}" for name in ("dense", "attention", "prompts", *CHARTS)}
    mixing = read_columns(tmp_path / "prototype_mixing.csv")
    assert mixing["alpha"].tolist() == mixing["beta"].tolist() == [0.5]  # never trained
    attention = read_columns(tmp_path / "prototype_attention.csv")
    total = sum(attention[f"c{i}"].sum() for i in range(4))
    assert total == pytest.approx(2 * 3, rel=1e-2)  # both maps of 3 classes sum to one


@pytest.mark.parametrize("missing", ["checkpoint", "data", "evaluation"])
def test_what_is_missing_is_said(missing, workdir, root, tmp_path, capsys):
    run = runs.read_run(workdir)
    if missing == "checkpoint":
        for name in ("config.json", "labels.json", "base.json"):
            (tmp_path / name).write_bytes((workdir / name).read_bytes())
        run = runs.dataclasses.replace(run, workdir=tmp_path)
    elif missing == "data":
        run.config.data.root = str(tmp_path / "gone")
    else:
        run = runs.dataclasses.replace(run, cases=[])
    assert pictures.prototype_pictures(run, tmp_path / "figures") == []
    words = {"checkpoint": "no complete checkpoint", "data": "gone", "evaluation": "no evaluated"}
    assert f"{words[missing]}" in capsys.readouterr().out
    assert not (tmp_path / "figures").exists()


def test_a_method_without_prototypes_has_no_pictures(workdir, tmp_path, capsys):
    assert pictures.prototype_pictures(runs.read_run(workdir), tmp_path) == []
    assert "no decoder passes" in capsys.readouterr().out
