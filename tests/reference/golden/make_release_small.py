"""Write the small golden sets from the numpy transcription.

release_small.json and .npz have two stages, and what every module gives; release_one_stage.json
the loss, gradients and updates of a model whose training step compiles in a fraction of the time.

    pip install autograd
    python -m tests.reference.golden.make_release_small

Same content and layout as the recorded set of the published sizes, except that the values are
float64 results (stored in float32). Deterministic; takes a minute.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import autograd.numpy as anp
import autograd.scipy.special
import numpy as np
from autograd import value_and_grad

from pgpsam_jax.utils.files import atomic_path, write_text
from tests.reference import release_numpy
from tests.reference.golden import golden_rule
from tests.reference.release_state import RANK, release_shapes

SIZES = {
    "image_size": 64,
    "patch_size": 8,
    "width": 32,
    "depth": 4,
    "heads": 2,
    "window_size": 5,  # no divisor of the grid, so windows reach past it
    "global_blocks": (0, 2, 3),
    "out_channels": 32,
    "lora_rank": RANK,
    "num_classes": 4,
}
# The fewest modules among which is one of each kind.
ONE_STAGE = SIZES | {"depth": 2, "global_blocks": (1,), "stages": 1, "layers": 1}
SEED, EPOCH = 0, 10
ADAMW = {"lr": 1e-4, "weight_decay": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-8}


def differentiable():
    """Let the transcription run on autograd's numpy."""
    release_numpy.np, release_numpy.erf = anp, autograd.scipy.special.erf


def total_and_gradients(trainable, frozen, image, labels):
    """Loss, and its gradient by trainable name: zeros where the loss does not depend on it."""

    def total(p):
        out = release_numpy.forward(image, {**frozen, **{name: p[name] for name in trainable}})
        return release_numpy.loss(out, labels, EPOCH)["total"]

    return value_and_grad(total)(trainable)


def adamw_losses(trainable, gradients, total, again, steps=3):
    """Losses before and after each AdamW step with decoupled decay; `again` gives the next pair.

    A tensor without a gradient is left alone, as PyTorch does.
    """
    losses, p = [total], dict(trainable)
    first, second = ({name: 0.0 for name in p} for _ in range(2))
    for step in range(1, steps + 1):
        for name, g in gradients.items():
            if not g.any():
                continue
            first[name] = ADAMW["b1"] * first[name] + (1 - ADAMW["b1"]) * g
            second[name] = ADAMW["b2"] * second[name] + (1 - ADAMW["b2"]) * g**2
            mean = first[name] / (1 - ADAMW["b1"] ** step)
            root = np.sqrt(second[name] / (1 - ADAMW["b2"] ** step))
            decayed = p[name] * (1 - ADAMW["lr"] * ADAMW["weight_decay"])
            p[name] = decayed - ADAMW["lr"] * mean / (root + ADAMW["eps"])
        total, gradients = again(p)
        losses.append(total)
    return losses


def recorded(out):
    """The arrays of the NPZ: batch axis, float32, every fourth pixel of the final logits."""
    out = dict(out)
    pre, final = out.pop("logits_pre"), out.pop("logits_final")
    out[f"logits_pre_{pre.shape[-1]}"] = pre
    out[f"logits_final_{final.shape[-1]}_stride4"] = final[:, ::4, ::4]
    return {name: value[None].astype(np.float32) for name, value in out.items()}


def digits(value):
    """The value with its floats cut to nine digits, a little more than float32 holds."""
    if isinstance(value, dict):
        return {key: digits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [digits(item) for item in value]
    return float(f"{value:.8e}") if isinstance(value, float) else value


def layout(sizes):
    """Name to shape of every tensor, in the order of the release's checkpoint."""
    return release_shapes(
        {
            "D": sizes["width"],
            "depth": sizes["depth"],
            "whole": sizes["global_blocks"],
            "G": sizes["image_size"] // sizes["patch_size"],
            "P": sizes["patch_size"],
            "C": sizes["width"] // sizes["heads"],
            "S": sizes["window_size"],
            "E": sizes["out_channels"],
            "N": sizes["num_classes"],
            "stages": sizes.get("stages", 2),
            "layers": sizes.get("layers", 2),
        }
    )


def trains(name):
    """Everything but the encoder, and the encoder's LoRA."""
    return "lora" in name or not name.startswith("image_encoder.")


def make(sizes):
    """(record, outputs) of a set."""
    shapes, size, classes = layout(sizes), sizes["image_size"], sizes["num_classes"]
    image = golden_rule.image(1, size, SEED)[0].astype(float)
    labels = golden_rule.labels(1, size, classes, SEED)[0]
    p = {name: golden_rule.tensor(name, s, SEED).astype(float) for name, s in shapes.items()}
    trainable = {name: value for name, value in p.items() if trains(name)}
    frozen = {name: value for name, value in p.items() if name not in trainable}

    def again(p):
        return total_and_gradients(p, frozen, image, labels)

    total, gradients = again(trainable)
    out = release_numpy.forward(image, p)
    summary = {}
    for name, g in gradients.items():
        probe = golden_rule.tensor(f"probe.{name}.kernel", g.shape, SEED)
        summary[name] = [float(np.linalg.norm(g)), float((g * probe).sum())] if g.any() else None
    record = {
        "made_with": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "scipy", "autograd")},
        },
        "sizes": sizes,
        "seed": SEED,
        "num_classes": classes,
        "batch": 1,
        "image_size": size,
        "state_dict": shapes,
        "trainable": list(trainable),
        "loss": release_numpy.loss(out, labels, EPOCH),
        "adamw": {**ADAMW, "losses": adamw_losses(trainable, gradients, total, again)},
        "gradients": summary,
    }
    return record, out


def main():
    differentiable()
    here = Path(__file__).parent
    for name, sizes in (("release_small", SIZES), ("release_one_stage", ONE_STAGE)):
        record, out = make(sizes)
        text = json.dumps(digits(record), separators=(",", ":"))
        write_text(here / f"{name}.json", text + "\n")
        if sizes is SIZES:
            with atomic_path(here / f"{name}.npz") as path:
                np.savez_compressed(path, **recorded(out))


if __name__ == "__main__":
    main()
