"""The official SAM checkpoint written down by hand, at any size, for conversion tests."""

import numpy as np

from tests.support.optional import torch

SMALL = dict(D=8, depth=3, whole=(1,), G=4, P=4, C=4, M=20, S=2, E=16, A=6, F=12, I=10, T=8)
VIT_B = dict(
    D=768, depth=12, whole=(2, 5, 8, 11), G=64, P=16, C=64, M=3072, S=14, E=256, A=128, F=2048,
    I=256, T=16,
)  # fmt: skip


def official_shapes(z: dict) -> dict[str, tuple]:
    """Names and shapes of the official SAM, written down from its modules, not from our table."""
    shapes = {}

    def linear(name, inputs, outputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    def conv(name, inputs, outputs, kernel, bias=True):
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes.update({f"{name}.bias": (outputs,)} if bias else {})

    def attention(name, inner):
        for head in "qkv":
            linear(f"{name}.{head}_proj", width, inner)
        linear(f"{name}.out_proj", inner, width)

    d, width = z["D"], z["E"]
    shapes["image_encoder.pos_embed"] = (1, z["G"], z["G"], d)
    conv("image_encoder.patch_embed.proj", 3, d, z["P"])
    for i in range(z["depth"]):
        block = f"image_encoder.blocks.{i}"
        norm(f"{block}.norm1", d)
        norm(f"{block}.norm2", d)
        for axis in "hw":
            rows = 2 * (z["G"] if i in z["whole"] else z["S"]) - 1
            shapes[f"{block}.attn.rel_pos_{axis}"] = (rows, z["C"])
        linear(f"{block}.attn.qkv", d, 3 * d)
        linear(f"{block}.attn.proj", d, d)
        linear(f"{block}.mlp.lin1", d, z["M"])
        linear(f"{block}.mlp.lin2", z["M"], d)
    conv("image_encoder.neck.0", d, width, 1, bias=False)
    norm("image_encoder.neck.1", width)
    conv("image_encoder.neck.2", width, width, 3, bias=False)
    norm("image_encoder.neck.3", width)

    prompt = "prompt_encoder"
    shapes[f"{prompt}.pe_layer.positional_encoding_gaussian_matrix"] = (2, width // 2)
    points = [f"point_embeddings.{m}" for m in range(4)]
    for name in [*points, "not_a_point_embed", "no_mask_embed"]:
        shapes[f"{prompt}.{name}.weight"] = (1, width)
    conv(f"{prompt}.mask_downscaling.0", 1, z["T"] // 4, 2)
    norm(f"{prompt}.mask_downscaling.1", z["T"] // 4)
    conv(f"{prompt}.mask_downscaling.3", z["T"] // 4, z["T"], 2)
    norm(f"{prompt}.mask_downscaling.4", z["T"])
    conv(f"{prompt}.mask_downscaling.6", z["T"], width, 1)

    decoder = "mask_decoder"
    shapes[f"{decoder}.iou_token.weight"] = (1, width)
    shapes[f"{decoder}.mask_tokens.weight"] = (4, width)
    for i in range(2):
        layer = f"{decoder}.transformer.layers.{i}"
        attention(f"{layer}.self_attn", width)
        attention(f"{layer}.cross_attn_token_to_image", z["A"])
        attention(f"{layer}.cross_attn_image_to_token", z["A"])
        linear(f"{layer}.mlp.lin1", width, z["F"])
        linear(f"{layer}.mlp.lin2", z["F"], width)
        for n in range(1, 5):
            norm(f"{layer}.norm{n}", width)
    attention(f"{decoder}.transformer.final_attn_token_to_image", z["A"])
    norm(f"{decoder}.transformer.norm_final_attn", width)
    for index, inputs, outputs in ((0, width, width // 4), (3, width // 4, width // 8)):
        shapes[f"{decoder}.output_upscaling.{index}.weight"] = (inputs, outputs, 2, 2)
        shapes[f"{decoder}.output_upscaling.{index}.bias"] = (outputs,)
    norm(f"{decoder}.output_upscaling.1", width // 4)
    for m in range(4):
        mlp = f"{decoder}.output_hypernetworks_mlps.{m}.layers"
        for j, outputs in enumerate((width, width, width // 8)):
            linear(f"{mlp}.{j}", width, outputs)
    for j, (a, b) in enumerate(((width, z["I"]), (z["I"], z["I"]), (z["I"], 4))):
        linear(f"{decoder}.iou_prediction_head.layers.{j}", a, b)
    return shapes


def random_state(sizes: dict, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = official_shapes(sizes)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def save_pth(path, state: dict):
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    return path
