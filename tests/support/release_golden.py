"""The golden sets of preset `release`: recorded at the published size, and the project's own.

All list names and shapes of the authors' state dict, rules for weights and input, and what comes
out. `recorded` is the output of the authors' code in float32 and lies outside the project; `small`
and `one_stage`, which has losses and gradients only, were computed in float64 by `release_numpy`
(tests/reference/golden).
"""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.pgpsam_release.model import ReleaseConfig, ReleasePgpSam
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.sam import SamConfig
from tests.support.places import REPOSITORY, shared
from weights_conversion import release, remap

UNUSED = "unused/"
ENCODER_SIZES = ("width", "depth", "heads", "global_blocks", "window_size", "out_channels")


class Golden:
    """One set: `meta` (the JSON), recorded arrays by name in our layout, weights by our path."""

    def __init__(self, folder: Path, stem: str, rule: str):
        self.meta = json.loads((folder / f"{stem}.json").read_text())
        self._stem = folder / stem
        spec = importlib.util.spec_from_file_location(rule, folder / f"{rule}.py")
        self.rule = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.rule)
        self.size, self.classes = self.meta["image_size"], self.meta["num_classes"]
        encoder, patch, sizes = "vit_b", 16, dict(self.meta.get("sizes", {}))
        stages, layers = sizes.get("stages", 2), sizes.get("layers", 2)
        if sizes:
            encoder, patch = "vit_t", sizes["patch_size"]
            sizes = {key: sizes[key] for key in ENCODER_SIZES}
            sizes["global_blocks"] = tuple(sizes["global_blocks"])
        sam = SamConfig.preset(encoder, self.size, patch, **sizes)
        sam = dataclasses.replace(sam, decoder=dataclasses.replace(sam.decoder, depth=layers))
        taps = (sam.encoder.global_blocks[-1], sam.encoder.global_blocks[0])[:stages]
        self.config = ReleaseConfig(sam, self.classes, taps, lora=LoraConfig(5))

    @functools.cached_property
    def _arrays(self):
        return np.load(self._stem.with_suffix(".npz"))

    @property
    def names(self) -> set[str]:
        """Of all recorded arrays."""
        return set(self._arrays.files)

    def __getitem__(self, name: str):
        """A recorded array, channels last."""
        array = self._arrays[name]
        maps = array.ndim == 4 and not name.startswith("image_encoder.tap")
        return np.moveaxis(array, 1, -1) if maps else array

    def first(self, prefix: str):
        """The recorded array whose name begins so: the rest of the name is a size."""
        return self[next(name for name in self.names if name.startswith(prefix))]

    @functools.cached_property
    def weights(self) -> dict:
        shapes = self.meta["state_dict"].items()
        tensors = {name: self.rule.tensor(name, shape, 0) for name, shape in shapes}
        return remap.read(release.RELEASE, tensors, "golden set")

    @property
    def images(self):
        return jnp.asarray(self.rule.image(1, self.size, 0)[:, 0])

    @property
    def labels(self):
        return jnp.asarray(self.rule.labels(1, self.size, self.classes, 0))

    def probe(self, name: str):
        return self.rule.tensor(f"probe.{name}.kernel", self.meta["state_dict"][name], 0)

    def model(self, dtype=jnp.float32) -> ReleasePgpSam:
        """The model with the set's weights, complete in both directions."""
        model = nnx.eval_shape(
            lambda: ReleasePgpSam(self.config, dtype=dtype, rngs=ShapeOnlyRngs())
        )
        state = nnx.state(model)
        leaves = flat_paths(state)
        assert set(leaves) == {path for path in self.weights if not path.startswith(UNUSED)}
        for path, leaf in leaves.items():
            assert leaf.shape == self.weights[path].shape
            leaf.set_value(jnp.asarray(self.weights[path], dtype))
        nnx.update(model, state)
        return model

    def theirs(self, ours: dict) -> dict:
        """Arrays by our path (those of `unused` weights zero) as the authors name and lay them."""
        zero = {path: np.zeros_like(array) for path, array in self.weights.items()}
        return remap.write(release.RELEASE, zero | ours, "gradients")


@functools.cache
def load(name: str) -> Golden:
    if name == "recorded":
        return Golden(shared("golden"), "release_synapse", "golden_weights")
    return Golden(REPOSITORY / "tests" / "reference" / "golden", f"release_{name}", "golden_rule")
