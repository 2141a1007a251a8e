"""Internals of a trained PGP-SAM on a few test slices, as the CSV files of its figures.

Letters: N slices, K classes, Q inter prototypes, C channels, h w token grid. A *pass* is a decoder
pass: 0 is the bootstrap, pass i > 0 follows stage i of PPR.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pgpsam_jax.data.cache import read_case
from pgpsam_jax.data.letterbox import Letterbox, to_model
from pgpsam_jax.data.preprocessing import intensity_limits, rescale
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.trained_run import load_run
from pgpsam_jax.report.figures.csv_rows import write_rows
from pgpsam_jax.report.figures.scored_volumes import TestSet, fullest_slice
from pgpsam_jax.report.figures.slice_panels import Slice
from pgpsam_jax.results.runs import Run
from pgpsam_jax.visualization.overlays import display_spacing, evenly_spaced

_CASES, _PER_CASE = 3, 8  # one slice per case is drawn, all count in shares


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """N slices and the decoder passes over them.

    examples: indices of the slices to draw. mixing: (alpha, beta) of PPR per stage; mix_start:
    their initial value.
    """

    names: tuple[str, ...]
    slices: list[Slice]
    examples: list[int]
    passes: list
    mixing: list[tuple[float, float]]
    mix_start: float
    image_size: int  # pixels along a side of the network's input

    @property
    def stages(self) -> range:
        """The passes that follow a stage of PPR; none if it is off."""
        return range(1, len(self.passes) if self.passes[-1].picks is not None else 1)


def probe_run(run: Run) -> Probe:
    """Runs the newest checkpoint on up to 24 slices of 3 scored cases; `UserError` if it cannot."""
    tests, trained = TestSet(run), load_run(run.workdir, run.path_overrides.get("model.base"))
    if not tests.cases:
        raise UserError(f"{run.workdir} has no evaluated test case")
    cases, examples, batches = list(tests.cases.values()), [], []
    slices: list[Slice] = []
    for case in [cases[place] for place in evenly_spaced(len(cases), _CASES)]:
        volume, truth = read_case(case, tests.table, tests.axis)
        bearing = (truth > 0).any(axis=(1, 2)) & tests.region_of(case.case_id, truth)
        chosen = np.flatnonzero(bearing)
        chosen = chosen[evenly_spaced(len(chosen), _PER_CASE)].tolist()
        if not chosen:
            continue
        batches.append(trained.passes(volume, chosen))
        examples.append(len(slices) + fullest_slice(truth[chosen], len(run.names)))
        ends = intensity_limits(tests.window, volume.array)
        for z in chosen:
            image = rescale(volume.array[z], ends)
            spacing = display_spacing(image.shape, volume.spacing[1:])
            slices.append(Slice(case.case_id, z, image, truth[z], spacing))
    if not batches:
        raise UserError("no test slice contains an organ")
    passes = [
        type(parts[0])(*(None if x[0] is None else np.concatenate(x) for x in zip(*parts)))  # noqa: B905
        for parts in zip(*batches, strict=True)
    ]
    if passes[0].intra is None:
        raise UserError(f"{run.workdir} was trained without prototypes (model.ppg is off)")
    stages = getattr(trained.model, "ppr", ())  # none if it is off
    weights = [stage.mixing for stage in stages]
    mixing = [(float(np.mean(alpha)), float(np.mean(beta))) for alpha, beta in weights]
    start = float(stages[0].mix_start) if stages else float("nan")
    return Probe(run.names, slices, examples, passes, mixing, start, run.config.model.image_size)


def write_tables(probe: Probe, folder) -> None:
    """Writes `prototype_*.csv`; attention, shares, picks and mixing only with PPR."""
    tables = {"dense": dense_rows, "similarity": similarity_rows, "prompts": prompt_rows}
    if probe.stages:
        tables |= {"attention": attention_rows, "shares": share_rows}
        tables |= {"picks": pick_rows, "mixing": mixing_rows}
    for name, rows in tables.items():
        write_rows(Path(folder) / f"prototype_{name}.csv", rows(probe))


def dense_rows(probe: Probe) -> list[dict]:
    """Rows of the dense prompt D per token: its norm and first three principal components.

    The components are computed over all example slices of a pass, which makes colors comparable.
    """
    rows = []
    for number, one in enumerate(probe.passes):
        dense = one.dense[probe.examples].astype(np.float64)
        flat = dense.reshape(-1, dense.shape[-1])
        centered = flat - flat.mean(axis=0)
        axes = np.linalg.svd(centered, full_matrices=False)[2][:3]
        axes *= np.where(axes.sum(axis=1, keepdims=True) < 0, -1, 1)  # svd leaves the sign open
        parts = (centered @ axes.T).reshape(*dense.shape[:-1], -1)
        norms = np.linalg.norm(dense, axis=-1)
        for place, index in enumerate(probe.examples):
            key = {**probe.slices[index].key, "pass": number}
            for row, column in np.ndindex(norms.shape[1:]):
                values = dict(zip(("pc1", "pc2", "pc3"), parts[place, row, column], strict=True))
                values["norm"] = norms[place, row, column]
                rows.append({**key, "row": row, "column": column, **_rounded(values)})
    return rows


def own_token_weights(probe: Probe) -> Iterator[tuple[dict, np.ndarray]]:
    """Yields W_c and W_q of each class's own token, (N, K, h, w), of every stage; W if it is one.

    The first part holds the columns `pass` and `map` of a CSV file.
    """
    for number in probe.stages:
        one = probe.passes[number]
        n, h, w, _ = one.feature.shape
        step = one.picks.shape[-1] + 1
        maps = {"W": one.query_weights}
        if one.class_weights is not None:
            maps = {"W_c": one.class_weights, "W_q": one.query_weights}
        for name, weights in maps.items():
            yield {"pass": number, "map": name}, weights[:, ::step].reshape(n, -1, h, w)


def attention_rows(probe: Probe) -> list[dict]:
    """One row per row of a map; columns c0, c1, ... hold its weights (a map sums to one)."""
    rows = []
    for place, weights in own_token_weights(probe):
        for index in probe.examples:
            key = probe.slices[index].key | place
            for k, line in np.ndindex(weights.shape[1:3]):
                values = {f"c{i}": x for i, x in enumerate(weights[index, k, line])}
                rows.append({**key, "class": probe.names[k], "row": line, **_rounded(values)})
    return rows


def share_rows(probe: Probe) -> list[dict]:
    """Rows per slice and organ: attention on the tokens that overlap it, and their share."""
    rows = []
    for place, weights in own_token_weights(probe):
        for index, part in enumerate(probe.slices):
            letterbox = Letterbox.of(part.truth.shape, probe.image_size)
            touched = _token_masks(part.truth, letterbox, len(probe.names), weights.shape[2:])
            for k in np.flatnonzero(touched[1:].any(axis=(1, 2))) + 1:
                on_organ = float(weights[index, k][touched[k]].sum())
                values = {"attention": on_organ, "tokens": float(touched[k].mean())}
                rows.append(part.key | place | {"class": probe.names[k]} | _rounded(values))
    return rows


def _token_masks(truth, letterbox: Letterbox, num_classes: int, token_grid) -> np.ndarray:
    """Whether each token contains a pixel of each class, boolean (K, h, w)."""
    labels = to_model(truth[None], letterbox, order=0)[0]
    one_hot = np.arange(num_classes)[:, None, None] == labels
    h, w = token_grid
    cells = one_hot.reshape(num_classes, h, labels.shape[0] // h, w, labels.shape[1] // w)
    return cells.any(axis=(2, 4))


def similarity_rows(probe: Probe) -> list[dict]:
    """Rows of cosines of class prototypes with each other and with inter prototypes.

    `learned`: as stored; `refined`: after the last stage, averaged over the slices. `length`: norm
    of the class prototype.
    """
    moments = {"learned": probe.passes[0]} | ({"refined": probe.passes[-1]} if probe.stages else {})
    rows = []
    for moment, one in moments.items():
        intra, inter = (
            x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (one.intra, one.inter)
        )
        length = np.linalg.norm(one.intra, axis=-1).mean(axis=0)
        for kind, others in (("intra", intra), ("inter", inter)):
            cosine = np.einsum("nkc,nqc->kq", intra, others) / len(intra)
            for k, q in np.ndindex(cosine.shape):
                key = {"prototypes": moment, "class": probe.names[k], "with": kind, "index": q}
                rows.append(key | _rounded({"cosine": cosine[k, q], "length": length[k]}))
    return rows


def prompt_rows(probe: Probe) -> list[dict]:
    """Rows of cosines between the sparse prompts of two classes, averaged over the slices."""
    rows = []
    for number, one in enumerate(probe.passes):
        length = np.linalg.norm(one.sparse, axis=-1, keepdims=True)
        unit = one.sparse / np.maximum(length, 1e-12)
        cosine = np.einsum("nkc,nqc->kq", unit, unit) / len(unit)
        for k, q in zip(*np.triu_indices(len(cosine), 1), strict=True):
            key = {"pass": number, "class": probe.names[k], "other": probe.names[q]}
            rows.append(key | _rounded({"cosine": cosine[k, q]}))
    return rows


def pick_rows(probe: Probe) -> list[dict]:
    """Rows of how often each class picked each inter prototype, as a share of the slices."""
    rows = []
    for number in probe.stages:
        picks, count = probe.passes[number].picks, probe.passes[0].inter.shape[1]
        for k, name in enumerate(probe.names):
            share = np.bincount(picks[:, k].ravel(), minlength=count) / len(picks)
            for q in range(count):
                key = {"pass": number, "class": name, "inter": q}
                rows.append(key | _rounded({"picked": share[q]}))
    return rows


def mixing_rows(probe: Probe) -> list[dict]:
    return [
        {"pass": i, "alpha": alpha, "beta": beta, "start": probe.mix_start}
        for i, (alpha, beta) in enumerate(probe.mixing, 1)
    ]


def _rounded(values: dict) -> dict:
    """Rounds to four significant digits to keep the files small."""
    return {key: float(f"{value:.4g}") for key, value in values.items()}
