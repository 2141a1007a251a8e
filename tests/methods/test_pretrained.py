"""Starting from a converted SAM: what is loaded, what is not, and how a workdir is held to it."""

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pgpsam_jax.checkpointing import frozen_weights
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam import weights
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from pgpsam_jax.utils.files import file_digest, write_json
from tests.support import micro
from tests.support.small_run import config_for, write_data


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """(stem, tensors) of a converted SAM with the tiny encoder, made for 64 px."""
    model = Sam(SamConfig.preset(micro.NAME, 64, 8), rngs=nnx.Rngs(7))
    rng = np.random.default_rng(7)
    tensors = {
        path: rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in flat_paths(nnx.state(model)).items()
    }
    stem = tmp_path_factory.mktemp("weights") / "sam_tiny"
    save_file(tensors, f"{stem}.safetensors")
    sidecar = {"format": weights.FORMAT, "format_version": weights.FORMAT_VERSION}
    write_json(f"{stem}.json", sidecar | {"sha256": file_digest(f"{stem}.safetensors")})
    return str(stem), tensors


@pytest.fixture
def config(sam, tmp_path):
    root = write_data(tmp_path / "data")
    return config_for(root, model__base=sam[0], model__train_encoder="lora")


def test_loads_what_it_should_and_nothing_else(config, sam):
    _, tensors = sam
    _, params, frozen, digest = build.init_model(config.model, 3, config.seed)
    assert digest == file_digest(sam[0] + ".safetensors")
    config.model.base, config.model.start = "", "sam"  # which a base makes the default
    _, fresh_params, fresh_frozen, _ = build.init_model(config.model, 3, config.seed)
    ours = flat_paths(params) | flat_paths(frozen)
    fresh = flat_paths(fresh_params) | flat_paths(fresh_frozen)
    resized = weights.fit_base(tensors, (4, 4), global_blocks=(1,))
    for path, leaf in ours.items():
        value = np.asarray(leaf[...])
        if path == "pe_layer/gaussian_matrix":
            wanted = tensors["prompt_encoder/pe_layer/gaussian_matrix"]
        elif path.endswith("dense/mlp/lin2/bias"):
            wanted = tensors["prompt_encoder/no_mask_embed"]
        elif "/lora/" in path:
            wanted = np.asarray(fresh[path][...])
        elif path.startswith(
            ("image_encoder", "mask_decoder/transformer", "mask_decoder/upscaling")
        ):
            wanted = resized[path]
        else:  # mask tokens, hypernetworks, prototypes and the paper's modules: one per class
            wanted = np.asarray(fresh[path][...])
        np.testing.assert_array_equal(value, wanted, err_msg=path)
        assert np.isfinite(value).all(), path


def test_without_prompt_generator_the_dense_default_is_sams(config, sam):
    config.model.ppg = config.model.ppr = False
    _, params, _, _ = build.init_model(config.model, 3, config.seed)
    wanted = sam[1]["prompt_encoder/no_mask_embed"]
    np.testing.assert_array_equal(flat_paths(params)["default_dense"][...], wanted)


def test_another_variant_is_refused(config):
    config.model.encoder = "vit_t"
    with pytest.raises(UserError, match="do not fit the model"):
        build.init_model(config.model, 3, config.seed)


def test_a_workdir_keeps_its_base(config, sam, tmp_path):
    _, _, frozen, digest = build.init_model(config.model, 3, config.seed)
    frozen_weights.pin_frozen_weights(tmp_path, sam[0], digest, frozen)
    frozen_weights.pin_frozen_weights(tmp_path, sam[0], digest, frozen)
    with pytest.raises(UserError, match="give the weights of that run"):
        frozen_weights.pin_frozen_weights(tmp_path, "other", "0" * 64, frozen)
    assert not (tmp_path / "frozen.safetensors").exists()


def test_a_random_backbone_is_kept_as_a_file_and_announced(config, tmp_path):
    config.model.base = ""
    assert "RANDOM AND FROZEN" in frozen_weights.base_notice(config.model, tmp_path)
    _, _, frozen, _ = build.init_model(config.model, 3, config.seed)
    frozen_weights.pin_frozen_weights(tmp_path, "", None, frozen)
    config.seed = 99
    _, _, other, _ = build.init_model(config.model, 3, config.seed)
    frozen_weights.pin_frozen_weights(tmp_path, "", None, other)
    for path, leaf in flat_paths(frozen).items():
        np.testing.assert_array_equal(leaf[...], flat_paths(other)[path][...], err_msg=path)
