"""Write the pinned shardings, sharding_*.json, anew: after a change of the tables on purpose.

python -m tests.reference.golden.make_sharding
"""

import functools
import re
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from pgpsam_jax.config import default_config
from pgpsam_jax.methods import build, registry
from pgpsam_jax.models import parameters
from pgpsam_jax.sharding import rules
from pgpsam_jax.utils.files import write_json

FOLDER = Path(__file__).parent


def mesh_of(*sizes: int) -> AbstractMesh:
    """(data, fsdp, tensor) of devices that need not be there."""
    return AbstractMesh(sizes, rules.AXES)


def configuration(method, encoder: str):
    config = default_config()
    config.model.name, config.model.preset = method
    config.model.encoder = encoder
    if encoder == "tiny_vit":
        config.model.patch_size = 4
    if not registry.METHODS[method].base_tensors:  # no SAM to adapt
        config.model.train_encoder = "full"
    return config


def abstract_leaves(config, classes: int = 9) -> dict:
    """Path -> shape of every parameter and buffer of a configuration's model."""
    _, params, frozen = build.abstract_model(config.model, classes)
    leaves = parameters.flat_paths(params) | parameters.flat_paths(frozen)
    return {path: leaf.shape for path, leaf in leaves.items()}


@functools.cache
def leaves_of(method, encoder: str) -> dict:
    """The same of a method with an encoder, for its own size."""
    config = configuration(method, encoder)
    config.model.mask_gate = "intended"  # the H-SAM with all of its parameters
    return abstract_leaves(config)


def table(method, encoder: str) -> dict:
    """What is split on a (2, 2, 2) mesh, path -> axes of every dimension; * is any number."""
    found = {}
    for path, shape in leaves_of(method, encoder).items():
        spec = rules.spec_of(method, path, shape, mesh_of(2, 2, 2))
        name = re.sub(r"(?<=/)\d+(?=/)", "*", path)
        assert found.setdefault(name, spec) == spec, f"{name} is not one row"
    split = {name: spec for name, spec in sorted(found.items()) if any(spec)}
    return {
        name: [list(axes) if isinstance(axes, tuple) else axes for axes in spec]
        for name, spec in split.items()
    }


def golden_file(method) -> Path:
    return FOLDER / f"sharding_{'_'.join(filter(None, method))}.json"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for method in registry.METHODS:
        write_json(golden_file(method), table(method, "vit_b"))
