"""An independent SAM for parity tests: `transformers.SamModel` on torch, and the way into ours.

Weights are random numpy tensors in the official checkpoint layout. They go to torch by the names
written here, and to our model by the converter, so neither side checks itself.
"""

import functools
import re
import zlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.sam.image_encoder import EncoderConfig
from pgpsam_jax.models.sam.mask_decoder import DecoderConfig
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from pgpsam_jax.models.sam.weights import fit_base, select_base
from tests.support.optional import F, torch, transformers
from weights_conversion.sam import from_official

# Two windowed and two global blocks; 12 tokens a side are padded to two windows of 7.
SMALL = SamConfig(
    (96, 96),
    EncoderConfig((12, 12), 8, 48, 4, 4, (1, 3), window_size=7, out_channels=64),
    DecoderConfig(width=64, heads=4, mlp_dim=96),
)

# Hugging Face names to official names, applied in order.
_RENAMES = (
    (r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^(image_encoder)\.layers\.", r"\1.blocks."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"neck\.conv1", "neck.0"), (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"), (r"neck\.layer_norm2", "neck.3"),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"\.mask_embed\.", ".mask_downscaling."),
    (r"downscaling\.conv1", "downscaling.0"), (r"downscaling\.layer_norm1", "downscaling.1"),
    (r"downscaling\.conv2", "downscaling.3"), (r"downscaling\.layer_norm2", "downscaling.4"),
    (r"downscaling\.conv3", "downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"), (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"layer_norm_final_attn", "norm_final_attn"), (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.layers.1."),
    (r"\.proj_in\.", ".layers.0."), (r"\.proj_out\.", ".layers.2."),
)  # fmt: skip


def official_name(name: str) -> str:
    """Name in the official checkpoint of a tensor of `transformers.SamModel`."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def empty_torch(config: SamConfig):
    """A `SamModel` of our sizes without storage; square, LayerNorm constants as published."""
    encoder, decoder = config.encoder, config.decoder
    size, width = config.image_size[0], decoder.width
    vision = transformers.SamVisionConfig(
        hidden_size=encoder.width, output_channels=encoder.out_channels,
        num_hidden_layers=encoder.depth, num_attention_heads=encoder.heads, image_size=size,
        patch_size=encoder.patch_size, window_size=encoder.window_size,
        global_attn_indexes=list(encoder.global_blocks), num_pos_feats=width // 2,
    )  # fmt: skip
    prompt = transformers.SamPromptEncoderConfig(
        hidden_size=width, image_size=size, patch_size=encoder.patch_size
    )
    mask = transformers.SamMaskDecoderConfig(
        hidden_size=width, mlp_dim=decoder.mlp_dim, num_hidden_layers=decoder.depth,
        num_attention_heads=decoder.heads, attention_downsample_rate=decoder.downsample,
        iou_head_hidden_dim=width, layer_norm_eps=1e-5,
    )  # fmt: skip
    whole = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config=prompt,
        mask_decoder_config=mask,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return transformers.SamModel(whole).eval()


def random_official(config: SamConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights in the official layout, none of them zero or negligible."""
    return {
        name: random_tensor(name, tuple(parameter.shape), seed)
        for name, parameter in (
            (official_name(n), p) for n, p in empty_torch(config).state_dict().items()
        )
    }


def random_tensor(name: str, shape, seed: int) -> np.ndarray:
    """Norm scales near 1, small biases, tables of 0.1, embeddings of 1, kernels that keep scale."""
    z = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if "rel_pos" in name or "pos_embed" in name:
        return 0.1 * z
    if len(shape) == 1:
        return 1 + 0.1 * z if name.endswith("weight") else 0.05 * z
    if re.search(r"(token|tokens|_embed|point_embeddings\.\d)\.weight$|gaussian_matrix$", name):
        return z
    return z / np.float32(np.sqrt(np.prod(shape[1:])))


def interpolated(official: dict, config: SamConfig) -> dict:
    """Official weights at another grid, by torch: position embedding and global tables."""
    result, (h, w) = dict(official), config.encoder.grid
    position = torch.from_numpy(official["image_encoder.pos_embed"]).permute(0, 3, 1, 2)
    position = F.interpolate(position, (h, w), mode="bilinear", align_corners=False)
    result["image_encoder.pos_embed"] = position.permute(0, 2, 3, 1).numpy()
    for block in config.encoder.global_blocks:
        for axis, size in (("h", h), ("w", w)):
            name = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            table = torch.from_numpy(official[name]).T[None]
            table = F.interpolate(table, 2 * size - 1, mode="linear", align_corners=False)
            result[name] = table[0].T.contiguous().numpy()
    return result


def torch_sam(config: SamConfig, official: dict):
    """`SamModel` with official weights of the right grid, which for the encoder may be oblong."""
    model = empty_torch(config)
    encoder = model.vision_encoder
    encoder.patch_embed.image_size = config.image_size
    for owner, name in _grid_parameters(model):  # oblong: what transformers makes is square
        value = official[official_name(name)]
        setattr(owner, name.rsplit(".", 1)[-1], torch.nn.Parameter(torch.from_numpy(value)))
    state = {n: torch.from_numpy(official[official_name(n)]) for n in model.state_dict()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _grid_parameters(model):
    yield model.vision_encoder, "vision_encoder.pos_embed"
    for i, layer in enumerate(model.vision_encoder.layers):
        for table in ("rel_pos_h", "rel_pos_w"):
            yield layer.attn, f"vision_encoder.layers.{i}.attn.{table}"


def jax_sam(config: SamConfig, official: dict, lora=None, dtype=jnp.float32) -> Sam:
    """Our SAM with official weights: converter, resizing to the grid, complete both ways.

    LoRA leaves, which no checkpoint has, are zero.
    """
    model = nnx.eval_shape(lambda: Sam(config, lora=lora, dtype=dtype, rngs=ShapeOnlyRngs()))
    graph, state = nnx.split(model)
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    shapes = {n: v.shape for n, v in leaves.items() if not isinstance(v, nnx.LoRAParam)}
    tensors = fit_base(
        from_official(official), config.encoder.grid, global_blocks=config.encoder.global_blocks
    )
    tensors = select_base(tensors, shapes)
    for name, leaf in leaves.items():
        leaf.set_value(jnp.asarray(tensors.get(name, np.zeros(leaf.shape, np.float32))))
    return nnx.merge(graph, state)


@functools.cache
def small():
    """Official weights, torch model and our model of the small size."""
    official = random_official(SMALL)
    return official, torch_sam(SMALL, official), jax_sam(SMALL, official)


encode = nnx.jit(lambda sam, images: sam.encode_image(images))


@nnx.jit
def predict(sam, embedding, prompts):
    """Logits and IoU predictions, with and without multimask output."""
    return [sam.predict(embedding, multimask=multi, **prompts) for multi in (True, False)]


def draw(*shape, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def first(x):
    """(B, H, W, C) array to a torch tensor (B, C, H, W)."""
    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1))


def last(x) -> np.ndarray:
    """Torch (B, C, H, W) to numpy (B, H, W, C)."""
    return x.detach().movedim(1, -1).numpy()


def relative(got, expected) -> float:
    """Relative L2 error in float64; the shapes must be equal."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
