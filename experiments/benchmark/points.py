"""Points of the benchmark: one task at one size each; lists are cross products or suites."""

import dataclasses
import functools

from experiments.measurement import points
from pgpsam_jax.errors import UserError

STEPS = ("encoder", "inference", "training")
# Not steps: the machine's matmul rate, scoring, import time, the loop, a run of the paper's size,
# and precomputed features, in seconds and FLOPs or in FLOPs alone.
ENCODED = ("encoded", "encoded_flops")
WHOLE = ("matmul", "scoring", "startup", "loop", "run", *ENCODED)
FROZEN = ("autosam", "samlst", "surgicalsam")  # methods with a frozen encoder
MODELS = ("pgpsam", "sam", *FROZEN)
DTYPES = ("float32", "bfloat16")
_KNOWN = {"task": STEPS + WHOLE, "model": MODELS, "dtype": DTYPES, "against": ("", "torch")}


@dataclasses.dataclass(frozen=True)
class Point(points.Point):
    """One task at one size.

    model: `pgpsam` (preset paper, augmentation in the training step), or `sam` (encoder with LoRA
    and SAM's decoder, no augmentation: also available in PyTorch). against: `torch`, or empty. The
    methods with a frozen encoder are for the tasks `encoded` and `encoded_flops`.
    """

    dtype: str = "float32"
    task: str = "training"
    model: str = "pgpsam"
    against: str = ""

    def __post_init__(self):
        super().__post_init__()
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} {getattr(self, name)!r} unknown; choose from "
                    f"{', '.join(filter(None, known))}"
                )
        if (self.task in ENCODED) != (self.model in FROZEN):
            raise UserError(
                f"task {self.task} is not for --models {self.model}: {' and '.join(ENCODED)} take "
                f"the methods with a frozen encoder, {', '.join(FROZEN)}, the other tasks do not"
            )
        if self.against and (self.model != "sam" or self.task not in STEPS):
            raise UserError(
                f"--against torch has no counterpart of {self.model} {self.task}; use --models sam "
                f"and tasks from {', '.join(STEPS)}"
            )

    @property
    def key(self) -> str:
        """Name of the row."""
        if self.task in ("scoring", "startup", "run"):
            return self.task
        if self.task == "matmul":
            return f"matmul {self.dtype}"
        words = [self.task, self.model, self.encoder, self.image_size, self.batch, self.dtype]
        words += [f"{name} {value}" for name, value in self.changes.items()]
        return " ".join(map(str, words + [f"against {self.against}"] * bool(self.against)))

    @property
    def changes(self) -> dict[str, str | int]:
        """The settings that differ from the defaults."""
        names = ("attention", "remat", "scan")
        return {n: value for n in names if (value := getattr(self, n)) != getattr(Point, n)}


cross = functools.partial(points.cross, Point)


def with_ceilings(steps: list[Point]) -> list[Point]:
    """Puts the matmul rate of each compute type before the steps that use it."""
    dtypes = dict.fromkeys(p.dtype for p in steps if p.task in STEPS)
    return points.unique([*(Point(task="matmul", dtype=dtype) for dtype in dtypes), *steps])


def cpu_suite() -> list[Point]:
    """Returns the CPU benchmarks: ViT-b at 512 px against PyTorch; scoring, start-up, loop."""
    steps = dict(model=["sam"], batch=[1, 2], against=["torch"])
    return [
        *cross(task=["training", "inference"], **steps),
        Point(task="scoring"),
        Point(task="startup"),
        Point(task="loop", encoder="vit_t", image_size=128, batch=4),
    ]


def gpu_suite() -> list[Point]:
    """Returns the benchmarks of one GPU, the most informative first."""
    half = functools.partial(cross, dtype=["bfloat16"])
    train = functools.partial(half, task=["training"])
    torch = dict(model=["sam"], against=["torch"])
    return points.unique(
        [
            *train(batch=[8]),
            *train(batch=[8], **torch),
            *half(task=["run", "loop"], batch=[12]),
            *train(batch=[16, 32, 1, 2, 4]),
            *train(batch=[8], attention=["cudnn", "lean", "folded", "naive"]),
            *half(task=["inference"], batch=[1, 8], **torch),
            *half(task=["inference"], batch=[8, 32, 1, 2, 4, 16]),
            *train(batch=[8], remat=["blocks", "attention", "dots"]),
            *train(batch=[1, 32], **torch),
            *half(task=["encoder"], batch=[8, 32]),
            *train(image_size=[1024], batch=[2, 8]),
            *train(encoder=["vit_l", "vit_h"], batch=[8]),
            *half(task=["training", "inference"], image_size=[256], batch=[32]),
            Point(batch=8),
            Point(task="scoring"),
            Point(task="startup"),
        ]
    )


SUITES = {"cpu": cpu_suite, "gpu": gpu_suite}
