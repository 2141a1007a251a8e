"""Model FLOPs in closed form from the model's sizes, the basis of model FLOP utilization (MFU).

Two FLOPs per multiply-add; only products (linear layers, convolutions, attention), no elementwise
work, no recomputation. Per image.

The backward pass repeats a product once per operand that needs a gradient: once for a frozen
weight (never if no gradient flows further back), twice for a trainable weight and for the two
activations of an attention product. In training, the encoder with LoRA thus costs about 2.1x its
forward pass, trainable parts 3x.

Window padding is counted separately, as `padding`: the cells of a window outside the token grid.
Letters as in models/: L tokens, D encoder width, C decoder width, K classes, Q inter-class
prototypes, r rank.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from pgpsam_jax.models.pgpsam.model import PgpSamConfig
from pgpsam_jax.models.sam.image_encoder import EncoderConfig, strips
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.mask_decoder import DecoderConfig
from pgpsam_jax.models.sam.sam import Encoder
from pgpsam_jax.models.sam.tiny_vit import STRIDES, TinyVitConfig


class Product(NamedTuple):
    """FLOPs of a kind of product: forward, forward on padded cells, operands with a gradient."""

    forward: float
    gradients: int = 2
    padding: float = 0.0


class Flops(NamedTuple):
    """Per image: forward pass and training step, and both on padded cells."""

    forward: float
    training: float
    forward_padding: float
    training_padding: float


def total(products: Iterable[Product]) -> Flops:
    """Sums over products."""
    products = list(products)
    return Flops(
        sum(p.forward for p in products),
        sum(p.forward * (1 + p.gradients) for p in products),
        sum(p.padding for p in products),
        sum(p.padding * (1 + p.gradients) for p in products),
    )


def encoder(
    config: Encoder, lora: LoraConfig | None, train: str, *, pad_projections: bool = False
) -> list[Product]:
    """Returns the products of the image encoder.

    Args:
      config: sizes of the encoder.
      lora: sizes of the LoRA layers, or None.
      train: `lora`, `full` or `frozen`.
      pad_projections: pads windows before the qkv projection and crops them after the output
        projection, as the published SAM does, rather than between the two, as this package does.
    """
    if isinstance(config, TinyVitConfig):
        return _tiny_vit(config, lora, train)
    (h, w), d, out = config.grid, config.width, config.out_channels
    tokens, full = h * w, train == "full"
    products = [Product(2 * tokens * d * 3 * config.patch_size**2, int(full))]
    adapted, rank = (len(lora.targets), lora.rank) if lora and train == "lora" else (0, 0)
    for i in range(config.depth):
        below = full or (adapted > 0 and i > 0)  # earlier blocks have trainable parameters
        within = full or adapted > 0
        window = 0 if i in config.global_blocks else config.window_size
        products += _attention_products(config, window, within, full)
        more = _padded_cells(config.grid, window) - tokens if window and pad_projections else 0
        products.append(_linear(tokens, d, 3 * d, below, full, more))
        products.append(_linear(tokens, d, d, within, full, more))
        products.append(_linear(tokens, d, 8 * d, within, full))  # both layers of the MLP
        if adapted:
            products.append(_linear(tokens, d, adapted * rank, below, True))
            products.append(_linear(tokens, rank, adapted * d, True, True))
    inside = full or adapted > 0
    return [
        *products,
        _linear(tokens, d, out, inside, full),
        _linear(tokens, 9 * out, out, inside, full),
    ]


def _tiny_vit(config: TinyVitConfig, lora: LoraConfig | None, train: str) -> list[Product]:
    (h, w), full = config.grid, train == "full"
    rank, adapted = (lora.rank, len(lora.targets)) if lora and train == "lora" else (0, 0)
    stride, first = STRIDES[config.patch_size], config.widths[0]
    size = 9 if stride == 2 else 1
    cells = [(4 * h) * (4 * w), (2 * h) * (2 * w), h * w, h * w]
    products = [
        _linear(cells[0] * stride**2, 3 * size, first // 2, False, full),
        _linear(cells[0], first // 2 * size, first, full, full),
    ]
    below = full  # a gradient flows further back
    for i, (dim, heads, window) in enumerate(
        zip(config.widths, config.head_counts, config.windows, strict=True)
    ):
        hidden = config.expansion * dim
        for _ in range(config.depths[i]):
            if not heads:
                products += _bottleneck(cells[i], cells[i], dim, hidden, dim, below, full)
                continue
            products.append(_linear(cells[i], dim, 3 * dim, below, full))
            if adapted:
                products.append(_linear(cells[i], dim, adapted * rank, below, True))
                products.append(_linear(cells[i], rank, adapted * dim, True, True))
            below = full or adapted > 0
            scale = 2 if i == 1 else 1
            products.append(_windowed_products(scale * h, scale * w, window, dim, below))
            products.append(_linear(cells[i], dim, dim, below, full))
            products.append(_linear(cells[i], 9, dim, below, full))  # depthwise
            products.append(_linear(cells[i], dim, 2 * hidden, below, full))  # both of the MLP
        if i + 1 < len(cells):
            out = config.widths[i + 1]
            products += _bottleneck(cells[i], cells[i + 1], dim, out, out, below, full)
    out = config.out_channels
    return [
        *products,
        _linear(h * w, config.widths[-1], out, below, full),
        _linear(h * w, 9 * out, out, below, full),
    ]


def _bottleneck(rows, rows_out, dim, hidden, out, below, full) -> list[Product]:
    """1x1, depthwise 3x3 and 1x1 convolution of TinyViT."""
    return [
        _linear(rows, dim, hidden, below, full),
        _linear(rows_out, 9, hidden, below, full),
        _linear(rows_out, hidden, out, below, full),
    ]


def _windowed_products(height, width, window, dim, gradient) -> Product:
    """q k^T and weights v of one block; an overhanging window has one key for all cells outside."""
    pairs = 0
    for _, rows in strips(height, window):
        for _, columns in strips(width, window):
            tokens = rows * columns
            count = (height // window if rows == window else 1) * (
                width // window if columns == window else 1
            )
            pairs += count * tokens * (tokens + (tokens < window**2))
    return Product(4 * dim * pairs, 2 * int(gradient))


def _linear(rows, dim, out, input_gradient=True, trained=True, padded_rows=0) -> Product:
    """(rows, dim) @ (dim, out), plus `padded_rows` of padding."""
    flops = 2 * dim * out
    return Product(flops * rows, int(input_gradient) + int(trained), flops * padded_rows)


def _attention_products(config: EncoderConfig, window: int, gradient: bool, tables: bool):
    """q k^T, weights v and q R of one block."""
    h, w = config.grid
    rows, columns = (_windows(h, window), _windows(w, window)) if window else ([h], [w])
    size_h, size_w = (window, window) if window else (h, w)
    needed = sum((a * b) ** 2 for a in rows for b in columns)
    computed = len(rows) * len(columns) * (size_h * size_w) ** 2
    # Each token's query meets one row of R_h per row of keys, and likewise for columns.
    pairs = sum(a * b * (a + b) for a in rows for b in columns)
    all_pairs = len(rows) * len(columns) * size_h * size_w * (size_h + size_w)
    d = config.width
    scores = Product(4 * d * needed, 2 * int(gradient), 4 * d * (computed - needed))
    position = Product(2 * d * pairs, int(gradient) + int(tables), 2 * d * (all_pairs - pairs))
    return [scores, position]


def _windows(length: int, size: int) -> list[int]:
    """Tokens along one axis of each window, without padding."""
    return [min(size, length - start) for start in range(0, length, size)]


def _padded_cells(grid, size: int) -> int:
    return math.prod(-(-n // size) * size for n in grid)


def two_way_transformer(config: DecoderConfig, cells: int, tokens: int) -> list[Product]:
    """Returns the products of the decoder's transformer, fully trained."""
    d, inner = config.width, config.width // config.downsample

    def attention(queries, keys, width):
        projections = 2 * d * width * (2 * queries + 2 * keys)
        return Product(projections + 4 * queries * keys * width)

    block = [
        attention(tokens, tokens, d),
        attention(tokens, cells, inner),
        _linear(tokens, d, 2 * config.mlp_dim),
        attention(cells, tokens, inner),
    ]
    return [*(block * config.depth), attention(tokens, cells, inner)]


def masks(config: DecoderConfig, cells: int, count: int) -> list[Product]:
    """Returns the products of upscaling and hypernetworks: `count` masks at 4H x 4W."""
    d = config.width
    return [
        _linear(cells, d, d),
        _linear(4 * cells, d // 4, d // 2),
        _linear(count, d, 2 * d + d // 8),
        _linear(16 * cells, d // 8, count),
    ]


def sam(
    encoder_config: EncoderConfig | TinyVitConfig,
    decoder: DecoderConfig,
    lora: LoraConfig | None,
    train: str,
) -> list[Product]:
    """Returns the products of SAM without a prompt: four mask tokens and the quality token."""
    cells = math.prod(encoder_config.grid)
    return [
        *encoder(encoder_config, lora, train),
        *two_way_transformer(decoder, cells, 5),
        *masks(decoder, cells, 4),
    ]


def pgpsam(config: PgpSamConfig, train: str, *, training: bool) -> list[Product]:
    """Returns the products of PGP-SAM, preset `paper`.

    Args:
      config: sizes of the model.
      train: `lora`, `full` or `frozen`.
      training: counts the bootstrap masks of deep supervision as well.
    """
    sizes, decoder = config.sam.encoder, config.sam.decoder
    cells, c = math.prod(sizes.grid), decoder.width
    classes, inter = config.num_classes, config.inter
    stages = len(config.stage_taps)
    # Without PPR the bootstrap is needed for its own loss only.
    passes = 1 + (stages if config.ppr else training)
    tokens = classes * (1 + config.ppg)
    adapts = train == "full" or (train == "lora" and config.lora.rank > 0)
    products = encoder(sizes, config.lora if config.lora.rank else None, train)
    products += [_linear(cells, sizes.tap_widths[tap], c, adapts) for tap in config.stage_taps]
    if config.cfm:
        products += [_linear(1, c, c)] * stages
    if config.ppg:
        products += _prompts(cells, c, classes, inter) * passes
    products += two_way_transformer(decoder, cells, tokens) * passes
    products += masks(decoder, cells, classes) * (2 if training else 1)
    if config.ppr:
        products += [_linear(cells, c, classes), *_refinement(config)] * stages
    return products


def _prompts(cells: int, c: int, classes: int, inter: int) -> list[Product]:
    """PPG: affinities, concatenations, two attentions and two MLPs (Eq 6 and 7)."""
    return [
        Product(4 * classes * inter * c),
        _linear(inter, c + classes, c),
        _linear(classes, c + inter, c),
        Product(4 * cells * inter * c),
        Product(4 * cells * classes * c),
        _linear(cells, c, c),
        _linear(classes, c, c),
    ]


def _refinement(config: PgpSamConfig) -> list[Product]:
    """PPR of one stage: fusion, prototype selection, class and query attention (Eq 3 to 5)."""
    (h, w), c = config.sam.encoder.grid, config.sam.decoder.width
    classes, cells = config.num_classes, h * w
    tokens = classes * (config.k + 1)
    return [
        _linear(cells, c + classes, c),
        Product(2 * classes * config.inter * c, 0),  # selection has no gradient
        Product(2 * cells * (c + classes + h + w + tokens)),
        Product(4 * tokens * cells * c),
    ]
