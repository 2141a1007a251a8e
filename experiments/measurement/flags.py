"""Flags of both commands; some take a comma-separated list."""

from argparse import ArgumentParser, Namespace

from experiments.measurement.timing import Effort
from pgpsam_jax.errors import UserError


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise UserError(
            f"{flag} {text!r} is not a list of numbers; write for example 1,2,4"
        ) from None


def add_point_flags(parser: ArgumentParser, output: str) -> None:
    """Adds the flags of `point_lists`, and `--output`."""
    add = parser.add_argument
    add("--encoders", default="vit_b", help="vit_t, vit_b, vit_l, vit_h, tiny_vit")
    add("--sizes", default="", help="image sizes in pixels: 512, of tiny_vit alone 256")
    add("--batches", default="1", help="batch sizes, per chip")
    add("--remat", default="none", help="recomputation policies of config.model")
    add("--attention", default="auto", help="attention backends of config.model")
    add("--scan", action="store_true", help="model.scan_blocks")
    add("--output", default=output, help="folder of the results")


def point_lists(options: Namespace) -> dict[str, list]:
    """Returns the values of a point's fields, except `dtype`."""
    encoders = words(options.encoders)
    sizes = options.sizes or ("256" if encoders == ["tiny_vit"] else "512")
    return dict(
        encoder=encoders,
        image_size=numbers("--sizes", sizes),
        batch=numbers("--batches", options.batches),
        remat=words(options.remat),
        attention=words(options.attention),
        scan=[int(options.scan)],
    )


def add_effort_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=50, help="timed steps per point, at most")
    parser.add_argument(
        "--budget",
        type=float,
        default=30.0,
        help="on a CPU: seconds per point after which five steps are enough",
    )


def effort_of(options: Namespace) -> Effort:
    if options.steps < 1:
        raise UserError("--steps is the number of timed steps; give 1 or more")
    return Effort(options.steps, options.budget)
