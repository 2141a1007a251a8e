"""Converts checkpoints of the PGP-SAM authors' code to workdirs of preset `release`, and back.

The model holds every weight that affects an output. `unused.safetensors` in the workdir keeps the
others and the order of the names, so the reverse conversion is exact.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open

from pgpsam_jax.checkpointing import frozen_weights
from pgpsam_jax.checkpointing.provenance import provenance
from pgpsam_jax.config import serialization
from pgpsam_jax.config.overrides import assign, load_file, split_flags
from pgpsam_jax.data.dataset import label_table
from pgpsam_jax.data.io.voxel_grid import AXIAL
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.trained_run import load_run
from pgpsam_jax.methods import build
from pgpsam_jax.methods.registry import method_of
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.sam.weights import read_safetensors
from pgpsam_jax.utils.files import atomic_folder, write_json
from weights_conversion import sam
from weights_conversion.checkpoint_files import (
    check_suffix,
    read_checkpoint,
    report_source,
    write_checkpoint,
    write_weights,
    writing,
)
from weights_conversion.release_table import TABLE
from weights_conversion.remap import Tensors, absent, read, write
from weights_conversion.tensor_layouts import Layout

RELEASE = Layout("release", "PGP-SAM", tuple(TABLE))
UNUSED = "unused/"  # prefix of our names for weights that affect no output
KEPT = "unused.safetensors"
LORA_RANK = 5  # the only rank of the release
_CONFIGS = Path(__file__).parents[1] / "configs"
_DEFAULTS = {9: "synapse_release.py", 5: "ventricle_release.py"}  # by classes
_NEEDED = {
    "preset": "release",
    "train_encoder": "lora",
    "dcn": "deformable",
    "token_order": "released",
}


def convert(source, output, settings=(), *, log=print) -> None:
    """Writes a workdir from a checkpoint of the release.

    Args:
      source: checkpoint file.
      output: new workdir.
      settings: `--config=FILE` and `--config.x=y` flags, as in `pgpsam_jax.main`.
      log: called with each line of the report.

    Raises:
      UserError: the file does not fit the configuration, or `output` exists.
    """
    source, output = Path(source), Path(output)
    if not source.is_file():
        raise UserError(f"{source} is not a file; give a checkpoint of the release")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already; choose another --output")
    digest = report_source(source, log)
    tensors, epoch = read_release(source)
    ours = read(RELEASE, tensors, str(source))
    log(f"read     {len(tensors)} tensors in the release layout")
    if casts := [name for name, tensor in tensors.items() if tensor.dtype != np.float32]:
        log(f"cast     {len(casts)} tensors to float32, such as {casts[0]}")
    config = config_of(settings, len(ours["intra"]), source)
    table = label_table(config.data)
    _check_settings(config.model, table, ours, source)
    config.model.base = ""  # the workdir holds the frozen weights
    config.data.axis = AXIAL  # the release has no other slices
    unused = {name: ours.pop(name) for name in list(ours) if name.startswith(UNUSED)}
    params, frozen = _states(config, table, ours, source)
    with writing(output), atomic_folder(output) as folder:
        write_json(folder / "labels.json", table.to_json())
        inputs = {"source": source.name, "source_sha256": digest, "source_epoch": epoch}
        write_json(folder / "provenance.json", provenance(**inputs))
        frozen_weights.pin_frozen_weights(folder, source.name, None, frozen)
        write_weights(folder / KEPT, unused, {"names": json.dumps(list(tensors))})
        with ocp.training.Checkpointer(folder.absolute() / "checkpoints") as checkpoints:
            checkpoints.save_checkpointables(epoch or 0, {"params": params})
        serialization.save_config(build.resolve_method_defaults(config), folder)
    log(f"kept     {len(unused)} tensors that affect no output, in {KEPT}")
    log(f"wrote    {output}: {table.num_classes} classes, checkpoint {epoch or 0}")


def reverse(workdir, output, *, overwrite: bool = False, log=print) -> None:
    """Writes a run's weights as a `.pth` or `.safetensors` checkpoint of the release.

    Weights that affect no output come from the workdir if it was converted; otherwise they are zero
    (scales of norms one).
    """
    workdir, output = Path(workdir), Path(output)
    check_suffix(output)
    _check_exportable(serialization.load_config(workdir).model, workdir)
    leaves = flat_paths(nnx.state(load_run(workdir).model))
    ours = {name: np.asarray(leaf[...]) for name, leaf in leaves.items()}
    log(f"read     {len(ours)} tensors of {workdir}")
    if not any("/lora/" in name for name in ours):
        ours |= _idle_lora(ours)
        log(f"added    zero LoRA of rank {LORA_RANK}: the run has none")
    if (workdir / KEPT).is_file():
        unused, names = _kept(workdir / KEPT)
    else:
        unused, names = _idle(ours), None
        log(f"added    {len(unused)} tensors that affect no output: zeros, scales of norms ones")
    tensors = write(RELEASE, ours | unused, str(workdir))
    ordered = {name: tensors[name] for name in names or tensors}
    write_checkpoint(output, ordered, overwrite=overwrite)
    log(f"wrote    {output}, {len(tensors)} tensors in the release layout")


def read_release(source: Path) -> tuple[Tensors, int | None]:
    """Reads tensors by the release's names, and the epoch if the file has one."""
    tensors, beside = read_checkpoint(source)
    if all(name.startswith("module.") for name in tensors):  # written by torch's DataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    epoch = beside.get("epoch")
    return tensors, epoch if type(epoch) is int and epoch >= 0 else None


def config_of(settings, classes: int, source) -> ConfigDict:
    """Returns the configuration of the flags; without a file, the recipe for `classes`."""
    files, fields = split_flags(settings)
    if not files and classes not in _DEFAULTS:
        raise UserError(
            f"{source} has {classes} classes with the background, and there is no default for that "
            "number; give a --config whose label table has as many"
        )
    file = files[-1].removeprefix("--config=") if files else _CONFIGS / _DEFAULTS[classes]
    try:
        config = load_file(str(file))
        assign(config, fields, "the command line")
        serialization.validate(config)
    except UserError as error:
        raise UserError(f"--config cannot be used: {error}") from None
    return config


def _check_settings(settings: ConfigDict, table: LabelTable, ours: Tensors, source: Path) -> None:
    """Raises `UserError` with every field of the configuration that the tensors contradict."""
    size, classes = sam.describe(ours), len(ours["intra"])
    tokens = ours["ppr/0/attention/class_attention/expand/kernel"].shape[1]
    encoder = SamConfig.preset(settings.encoder, settings.image_size, settings.patch_size).encoder
    fields = {f"model.{field}": (settings[field], value) for field, value in _NEEDED.items()} | {
        "classes in data.label_table": (table.num_classes, classes),
        "width of model.encoder": (encoder.width, ours["image_encoder/pos_embed"].shape[-1]),
        "depth of model.encoder": (encoder.depth, sum("/attn/qkv/kernel" in name for name in ours)),
        "model.image_size": (settings.image_size, size["image_size"]),
        "model.patch_size": (settings.patch_size, size["patch_size"]),
        "model.lora_rank": (
            settings.lora_rank,
            ours["image_encoder/blocks/0/attn/lora/a"].shape[-1],
        ),
        "model.alpha": (settings.alpha, len(ours["inter"]) // classes),
        "model.colors": (settings.colors.replace("auto", "unit"), "unit"),  # auto: without a base
        "model.k": (settings.k, tokens // classes - 1),
    }
    if wrong := _contradictions(fields):
        raise UserError(f"--config does not fit {source}: it has {wrong}; change these")


def _contradictions(fields: dict[str, tuple]) -> str:
    """Describes the fields whose (actual, required) values differ."""
    return "; ".join(
        f"{name} {is_}, not {must}" for name, (is_, must) in fields.items() if is_ != must
    )


def _states(config: ConfigDict, table: LabelTable, ours: Tensors, source: Path):
    """Returns the trainable and frozen parameters with the tensors in place."""
    _, params, frozen = build.abstract_model(config.model, table.num_classes)
    leaves = flat_paths(params) | flat_paths(frozen)
    shapes = ({path: a.shape for path, a in arrays.items()} for arrays in (leaves, ours))
    check_fit(*shapes, source)
    for path, leaf in leaves.items():
        leaf.set_value(jnp.asarray(ours[path]))
    return params, frozen


def check_fit(needed: dict[str, tuple], given: dict[str, tuple], source) -> None:
    """Raises `UserError` with every path whose shape in the model and the file differs."""
    different = [
        f"{path} is {given.get(path, 'missing')}, expected {needed.get(path, 'no such tensor')}"
        for path in sorted(needed.keys() | given.keys())
        if needed.get(path) != given.get(path)
    ]
    if different:
        raise UserError(
            f"{source} does not fit the model of --config in {len(different)} places; change its "
            "model fields:\n  " + "\n  ".join(different)
        )


def _check_exportable(settings: ConfigDict, workdir: Path) -> None:
    lora = ("q", "v") if settings.train_encoder == "full" else tuple(settings.lora_targets)
    fields = {
        "model.preset": (settings.preset, "release"),
        "model.dcn": (settings.dcn, "deformable"),
        "model.token_order": (settings.token_order, "released"),
        "model.colors": (method_of(settings).resolve_colors(settings), "unit"),
        "model.lora_targets": (lora, ("q", "v")),
    }
    if wrong := _contradictions(fields):
        raise UserError(f"the release's layout cannot hold {workdir}: it has {wrong}")


def _kept(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads the weights that affect no output, and all names of the checkpoint in order."""
    unused = read_safetensors(path)
    try:
        with safe_open(path, "numpy") as file:
            names = json.loads(file.metadata()["names"])
    except (KeyError, TypeError, ValueError, RecursionError):  # written by another program
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} does not name the weights of a checkpoint; convert it again")
    return unused, names


def _idle(ours: Tensors) -> dict[str, np.ndarray]:
    """Returns the release's additional weights as zeros and ones."""
    return {
        name: np.full(shape, float(name.endswith("/scale")), np.float32)
        for name, shape in absent(RELEASE, ours).items()
        if name.startswith(UNUSED)
    }


def _idle_lora(ours: Tensors) -> dict[str, np.ndarray]:
    """Returns a zero LoRA for q and v of every block."""
    width = ours["image_encoder/pos_embed"].shape[-1]
    shapes = {"a": (2, width, LORA_RANK), "b": (2, LORA_RANK, width)}
    blocks = [n.removesuffix("/qkv/kernel") for n in ours if n.endswith("/attn/qkv/kernel")]
    return {
        f"{block}/lora/{leaf}": np.zeros(shape, np.float32)
        for block in blocks
        for leaf, shape in shapes.items()
    }
