"""The same model in PyTorch: parts of `transformers.SamModel`, with LoRA on q and v.

Sizes come as the dictionary of a `SamConfig`, so that a process with PyTorch needs no JAX.
"""

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from experiments.benchmark import random_weights, tiny_vit_torch
from experiments.benchmark.random_weights import CLASSES, LEARNING_RATE, WEIGHT_DECAY

_DICE_EPS = 1e-5


class LoraQkv(nn.Module):
    """A frozen (D, 3D) projection with a low-rank update of its q and v.

    groups: parts of its output that have q, k and v of some heads: 1 for SAM, the heads of TinyViT.
    """

    def __init__(self, projection: nn.Linear, name: str, groups: int):
        super().__init__()
        tensors = random_weights.lora_tensors(name, projection.in_features)
        self.a, self.b = (nn.Parameter(torch.from_numpy(each)) for each in tensors)
        self.projection, self.groups = projection, groups

    def forward(self, x):
        qkv = self.projection(x)
        parts = qkv.unflatten(-1, (self.groups, 3, -1))
        for i, target in enumerate((0, 2)):
            update = x @ self.a[i] @ self.b[i]
            parts[..., target, :] += update.unflatten(-1, (self.groups, -1))
        return qkv


def load_tensors(sizes: dict) -> dict[str, torch.Tensor]:
    """Returns the tensors of `random_weights` by the names of `SamModel`."""
    shapes = {name: tuple(t.shape) for name, t in _empty(sizes, "eager").state_dict().items()}
    return {name: torch.from_numpy(t) for name, t in random_weights.sam_tensors(shapes).items()}


def build(sizes: dict, tensors: dict[str, torch.Tensor], attention: str):
    """Builds `SamModel` with these tensors (not copied) and LoRA; attention: `sdpa` or `eager`."""
    model = _empty(sizes, attention)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False)
    for name, module in list(model.vision_encoder.named_modules()):
        if name.endswith(".attn"):
            groups = module.heads if isinstance(module, tiny_vit_torch.Attention) else 1
            module.qkv = LoraQkv(module.qkv, name, groups)
    model.mask_decoder.requires_grad_(True)
    model.mask_decoder.iou_prediction_head.requires_grad_(False)
    return model.eval()


def _empty(sizes: dict, attention: str) -> "transformers.SamModel":  # loads when used
    encoder, decoder = sizes["encoder"], sizes["decoder"]
    width, size = decoder["width"], sizes["image_size"][0]
    place = dict(image_size=size, patch_size=encoder["patch_size"])
    vision = dict(place, output_channels=width, num_pos_feats=width // 2)
    tiny = "windows" in encoder
    if tiny:  # takes the place of theirs
        vision |= dict(num_hidden_layers=0)
    else:
        vision |= dict(
            hidden_size=encoder["width"],
            num_hidden_layers=encoder["depth"],
            num_attention_heads=encoder["heads"],
            window_size=encoder["window_size"],
            global_attn_indexes=list(encoder["global_blocks"]),
        )
    mask = dict(
        hidden_size=width,
        mlp_dim=decoder["mlp_dim"],
        num_hidden_layers=decoder["depth"],
        num_attention_heads=decoder["heads"],
        attention_downsample_rate=decoder["downsample"],
        iou_head_hidden_dim=width,
        layer_norm_eps=1e-5,  # of the token norms, as published; transformers' default is 1e-6
    )
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config=dict(place, hidden_size=width),
        mask_decoder_config=mask,
        attn_implementation=attention,
    )
    with torch.device("meta"):
        model = transformers.SamModel(config)
        if tiny:
            model.vision_encoder = tiny_vit_torch.TinyVit(encoder)
    return model


def encode(model, images):
    """Maps images (B, 3, S, S) to the neck's output (B, C, H, W)."""
    encoder = model.vision_encoder
    if isinstance(encoder, tiny_vit_torch.TinyVit):
        return encoder(images)
    x = encoder.patch_embed(images) + encoder.pos_embed
    for layer in encoder.layers:
        x = layer(x)
    return encoder.neck(x)


def predict(model, images):
    """Maps images (B, 3, S, S) to the logits of three masks, (B, 3, 4H, 4W)."""
    embedding = encode(model, images)
    positions = model.get_image_wide_positional_embeddings()
    dense = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    masks, _ = model.mask_decoder(
        image_embeddings=embedding,
        image_positional_embeddings=positions.expand(len(embedding), -1, -1, -1),
        sparse_prompt_embeddings=None,
        dense_prompt_embeddings=dense.expand_as(embedding),
        multimask_output=True,
    )
    return masks[:, 0]


def loss(model, images, labels):
    """Returns 0.2 CE + 0.8 soft Dice at full size; labels (B, S, S) int64."""
    logits = F.interpolate(predict(model, images).float(), labels.shape[1:], mode="bilinear")
    probability = logits.softmax(1)
    truth = F.one_hot(labels, CLASSES).movedim(-1, 1).to(probability.dtype)
    pixels = (0, 2, 3)
    overlap = (probability * truth).sum(pixels)
    mass = probability.square().sum(pixels) + truth.sum(pixels)
    dice = (1 - 2 * overlap / (mass + _DICE_EPS)).mean()
    return 0.2 * F.cross_entropy(logits, labels) + 0.8 * dice


def optimizer_of(model) -> torch.optim.Optimizer:
    """Returns fused AdamW for the trainable parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
