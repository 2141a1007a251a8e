"""SAM-LST: the CNN beside SAM's encoder, its batch statistics, the gate, what it starts from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.checkpointing import frozen_weights
from pgpsam_jax.config import default_config, method_recipes
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.predictor import make_predict_step
from pgpsam_jax.methods import build, pretrained
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.models.baselines.resnet import ResNet18
from pgpsam_jax.models.baselines.sam_lst import SamLst
from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.parameters import count, flat_paths, report
from pgpsam_jax.models.sam.sam import SamConfig
from tests.support import micro
from tests.support.method_runs import CLASSES, loss_falls, run_of, small_config, squares
from tests.support.optional import F, torch
from weights_conversion import convert, resnet

SAM = SamConfig.preset(micro.NAME, (32, 48), 8)


@functools.cache
def small():
    """(graph, state) of a model at its start."""
    return nnx.split(SamLst(SAM, CLASSES, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def encoded():
    rng = np.random.default_rng(0)
    return {
        "feature": jnp.asarray(rng.standard_normal((2, 4, 6, 32)), jnp.float32),
        "images": jnp.asarray(rng.uniform(size=(2, 32, 48, 3)), jnp.float32),
    }


def test_parameters_of_the_original():
    """docs/methods.md#sam-lst: the ResNet-18 to its third group, the gate, the upscaling."""
    config = default_config()
    method_recipes.apply_recipe(config, "samlst")
    _, params, frozen = build.abstract_model(config.model, 9)
    assert count(params) == 2_856_737 == 2_782_784 + 1 + 73_952
    # The averages, two for each of 2240 channels, are none of the parameters.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2_856_737 + 2 * 2240
    assert "2,856,737" in report(params, frozen)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_the_cnn_has_the_grid_of_the_encoder(patch):
    def run(images):
        return ResNet18(8, patch, rngs=ShapeOnlyRngs())(images, training=False)

    features = jax.eval_shape(run, jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32))
    assert features.shape == (1, 64 // patch, 96 // patch, 32)


def test_other_patches_are_refused():
    with pytest.raises(UserError, match="4, 8 or 16 px, not 32"):
        ResNet18(8, 32, rngs=ShapeOnlyRngs())


# ResNet-18 in PyTorch's own layers, by torchvision's names: the other side of the conversion.
def torch_state(rng, width=64):
    """A state dict with all that the published file has, the parts that are not used too."""
    state = {}

    def add(name, *shape, scale=1.0, shift=0.0):
        values = shift + scale * rng.standard_normal(shape)
        state[name] = torch.tensor(values, dtype=torch.float32)

    def norm(name, channels):
        add(f"{name}.weight", channels, scale=0.2, shift=1.0)
        add(f"{name}.bias", channels, scale=0.2)
        add(f"{name}.running_mean", channels, scale=0.2)
        state[f"{name}.running_var"] = torch.tensor(rng.uniform(0.5, 2, channels)).float()
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    add("conv1.weight", width, 3, 7, 7, scale=147**-0.5)
    norm("bn1", width)
    dim = width
    for group in range(1, 5):
        out = width * 2 ** (group - 1)
        for block in range(2):
            name, inputs = f"layer{group}.{block}", dim if block == 0 else out
            for n, channels in ((1, inputs), (2, out)):
                add(f"{name}.conv{n}.weight", out, channels, 3, 3, scale=(9 * channels) ** -0.5)
                norm(f"{name}.bn{n}", out)
            if block == 0 and group > 1:
                add(f"{name}.downsample.0.weight", out, dim, 1, 1, scale=dim**-0.5)
                norm(f"{name}.downsample.1", out)
        dim = out
    add("fc.weight", 10, dim)
    add("fc.bias", 10)
    return state


def torch_features(state, images, training):
    """Features (B, H, W, C) of images (B, rows, columns, 3); in training the averages move."""

    def conv(x, name, stride):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        words = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{word}"] for word in words), training)

    with torch.no_grad():
        x = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)
        x = F.max_pool2d(F.relu(norm(conv(x, "conv1", 2), "bn1")), 3, 2, 1)
        for group in (1, 2, 3):
            for block in range(2):
                name, stride = f"layer{group}.{block}", 2 if group > 1 and block == 0 else 1
                y = F.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
                y = norm(conv(y, f"{name}.conv2", 1), f"{name}.bn2")
                if f"{name}.downsample.0.weight" in state:
                    x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
                x = F.relu(x + y)
        return x.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("resnet") / "resnet18.pth"
    torch.save(torch_state(np.random.default_rng(1), width=8), file)
    return file


@pytest.mark.parametrize("training", [False, True], ids=["averages", "batch"])
def test_converted_weights_compute_what_torch_does(training):
    """Features, measured 6e-7 and 3e-6 of the largest, and the averages after a batch.

    PyTorch's running variance is unbiased, n / (n - 1) of ours: 0.7 % at 144 positions.
    """
    state = torch_state(np.random.default_rng(1), width=16)
    ours = resnet.from_torchvision({name: tensor.numpy() for name, tensor in state.items()})
    graphdef, leaves = nnx.split(nnx.eval_shape(lambda: ResNet18(16, 16, rngs=ShapeOnlyRngs())))
    assert {p: leaf.shape for p, leaf in flat_paths(leaves).items()} == {
        path: tensor.shape for path, tensor in ours.items()
    }
    for path, leaf in flat_paths(leaves).items():
        leaf.set_value(jnp.asarray(ours[path]))
    images = np.random.default_rng(2).uniform(size=(3, 96, 128, 3)).astype(np.float32)

    @jax.jit
    def run(leaves, images):
        cnn = nnx.merge(graphdef, leaves)
        return cnn(images, training=training), nnx.state(cnn)

    features, after = run(leaves, images)
    wanted = torch_features(state, images, training)
    assert features.shape == wanted.shape == (3, 6, 8, 64)
    assert np.abs(features - wanted).max() / np.abs(wanted).max() <= 2e-5
    moved = resnet.from_torchvision({name: tensor.numpy() for name, tensor in state.items()})
    for path, leaf in flat_paths(after).items():
        tolerance = 1e-2 if training and path.endswith("/var") else 2e-5
        np.testing.assert_allclose(leaf[...], moved[path], rtol=tolerance, atol=2e-5, err_msg=path)


def test_a_run_starts_from_the_converted_file(checkpoint_file, tmp_path, capsys):
    arguments = ["--kind", "resnet18", "--source", str(checkpoint_file)]
    convert.main([*arguments, "--output", str(tmp_path / "cnn")])
    assert "75 of 122 tensors" in capsys.readouterr().out
    config = small_config("samlst", model__cnn_base=str(tmp_path / "cnn"))
    _, params, _, _ = build.init_model(config.model, CLASSES, config.seed)
    kernel = torch.load(checkpoint_file, weights_only=True)["layer3.1.conv2.weight"].numpy()
    found = flat_paths(params)["cnn/groups/2/1/conv2/kernel"]
    np.testing.assert_array_equal(found[...], kernel.transpose(2, 3, 1, 0))
    assert "CNN" not in frozen_weights.base_notice(config.model, tmp_path)


def test_a_random_cnn_is_said_loudly(tmp_path):
    config = small_config("samlst")
    assert "CNN BESIDE THE ENCODER STARTED AT RANDOM" in frozen_weights.base_notice(
        config.model, tmp_path
    )
    assert "CNN" not in frozen_weights.base_notice(small_config("samed").model, tmp_path)


def test_files_that_are_no_resnet(checkpoint_file, tmp_path):
    wide = small_config("samlst", model__cnn_base=str(tmp_path / "wide"))
    wide.model.encoder = "vit_b"
    with pytest.raises(UserError, match=r"wide.safetensors .* does not exist; download .*resnet18"):
        pretrained.apply_cnn(wide.model, *build.abstract_model(wide.model, CLASSES)[1:])
    resnet.convert(checkpoint_file, tmp_path / "cnn", log=lambda text: None)
    shapes = {"conv1/kernel": (7, 7, 3, 64)}
    with pytest.raises(UserError, match="does not fit the CNN beside this encoder"):
        resnet_weights.load_cnn(tmp_path / "cnn", shapes)
    with pytest.raises(UserError, match="which samed lacks; leave it empty"):
        build.init_model(
            small_config("samed", model__cnn_base=str(tmp_path / "cnn")).model, CLASSES, 0
        )
    renamed = tmp_path / "resnet18-0123abcd.pth"
    renamed.write_bytes(checkpoint_file.read_bytes())
    with pytest.raises(UserError, match="instead of 0123abcd"):
        resnet.convert(renamed, tmp_path / "other", log=lambda text: None)
    assert not (tmp_path / "other.safetensors").exists()


@jax.jit
def logits_of(state, gate, encoded):
    model = nnx.merge(small()[0], state)
    model.gate.set_value(gate)
    return model.segment(encoded)["final"]


@jax.jit
def cnn_features(state, images):
    return nnx.merge(small()[0], state).cnn(images, training=False)


@jax.jit
def decoded(state, feature):
    model = nnx.merge(small()[0], state)
    return model.mask_decoder.masks(*model.transform(feature))


def test_the_gate_mixes_sam_and_cnn(encoded):
    """g = 1/2 at the start; at a = 30 the decoder sees SAM's feature alone."""
    _, state = small()
    assert state["gate"][...].shape == () and float(state["gate"][...]) == 0
    feature = encoded["feature"]
    half = decoded(state, (feature + cnn_features(state, encoded["images"])) / 2)
    alone = decoded(state, feature)
    for gate, wanted in ((0, half), (30, alone)):
        found = logits_of(state, jnp.float32(gate), encoded)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(half - alone).max() > 0.1


@pytest.mark.slow
def test_bfloat16_is_close(encoded):
    """Largest difference over largest logit: measured 0.016."""
    _, state = small()
    rough = nnx.eval_shape(lambda: SamLst(SAM, CLASSES, dtype=jnp.bfloat16, rngs=ShapeOnlyRngs()))
    graphdef = nnx.graphdef(rough)
    half = jax.jit(lambda s, x: nnx.merge(graphdef, s).segment(x)["final"])(state, encoded)
    full = logits_of(state, jnp.float32(0), encoded)
    assert half.dtype == np.float32
    assert np.abs(full - half).max() / np.abs(full).max() <= 0.05


def test_what_trains_has_a_gradient_and_nothing_else_trains():
    run = run_of("samlst")
    leaves, slopes = flat_paths(run.states[0].params), run.slopes()
    averages = {path for path, leaf in leaves.items() if isinstance(leaf, nnx.BatchStat)}
    assert averages == {path for path in leaves if path.endswith(("/mean", "/var"))}
    parts = ("cnn/", "gate", "mask_decoder/upscaling/")
    every = leaves.keys() | flat_paths(run.frozen).keys()
    assert leaves.keys() == {path for path in every if path.startswith(parts)}
    assert {path for path, leaf in slopes.items() if not leaf.any()} == averages


def test_a_step_sets_the_running_averages_of_the_global_batch():
    """The first layer's after one step, from 0 and 1, to 1e-6; all move in every step."""
    states = run_of("samlst").states
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    start, params, later = (flat_paths(state.params) for state in states[:3])
    images = squares()["image"].astype(np.float32)
    maps = jax.lax.conv_general_dilated(
        np.repeat(images[..., None], 3, -1),
        start["cnn/conv1/kernel"][...],
        (2, 2),
        [(3, 3)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean, var = (f(maps, axis=(0, 1, 2)) for f in (jnp.mean, jnp.var))
    np.testing.assert_allclose(params["cnn/norm1/mean"][...], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(params["cnn/norm1/var"][...], 0.9 + 0.1 * var, atol=1e-6)
    for path, leaf in params.items():
        if path.endswith(("/mean", "/var")):
            assert np.any(leaf[...] != start[path][...]), path
            assert np.any(leaf[...] != later[path][...]), path


def test_an_answer_does_not_depend_on_the_rest_of_the_batch():
    run = run_of("samlst")
    predict = jax.jit(make_predict_step(run.graphdef))
    images = squares()["image"]
    others = np.concatenate([images[:1], np.flip(images[1:], axis=1) ** 2])
    ours, theirs = (predict(run.states[-1].params, run.frozen, x)[0] for x in (images, others))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_random_weights_that_never_train_are_kept_with_a_given_sam(tmp_path):
    """Mask tokens and hypernetworks are random and frozen: a run does not hang on its seed."""
    config, frozen = small_config("samlst"), run_of("samlst").frozen
    random_frozen = pretrained.randomly_initialized_frozen_params(config.model, frozen)
    roots = {path.rsplit("/layers")[0] for path in random_frozen}
    assert roots == {f"mask_decoder/{n}" for n in ("mask_tokens", "hyper_mlps", "iou_head")}
    frozen_weights.pin_frozen_weights(tmp_path, "sam", "0" * 64, frozen, random_frozen)
    assert frozen_weights.pinned(tmp_path)["sha256"] == "0" * 64
    config.seed = 5
    _, _, other, _ = build.init_model(config.model, CLASSES, config.seed)
    own = flat_paths(other)["image_encoder/pos_embed"][...]
    frozen_weights.pin_frozen_weights(
        tmp_path,
        "sam",
        "0" * 64,
        other,
        pretrained.randomly_initialized_frozen_params(config.model, other),
    )
    for path, leaf in random_frozen.items():
        np.testing.assert_array_equal(leaf[...], flat_paths(other)[path][...], err_msg=path)
    np.testing.assert_array_equal(flat_paths(other)["image_encoder/pos_embed"][...], own)


def test_training_lowers_the_loss():
    """Twenty steps on squares, SAM random and frozen: measured 0.800 to 0.640."""
    found = loss_falls("samlst")
    assert found[-1] < 0.9 * found[0]
