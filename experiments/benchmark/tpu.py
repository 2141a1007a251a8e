"""Memory of the training step on TPUs that are not there, from the compiler alone; never time.

Every combination of the lists is compiled for one topology, data parallel, in bfloat16; the table
gives bytes of one chip. Needs libtpu (pip install '.[tpu]'), no TPU; minutes a row.

Example:
  JAX_PLATFORMS=cpu python -m experiments.benchmark.tpu --topology v6e:2x2 --sizes 512 --batches 4
"""

import argparse
import itertools
import time

from experiments.benchmark.__main__ import numbers, words
from pgpsam_jax import sharding, topology
from pgpsam_jax.config import default_config
from pgpsam_jax.errors import exit_on_user_error

CLASSES = 9  # eight organs and background, as Synapse
HEADS = ("chip", "model", "px", "images/chip", "attention", "remat", "arguments MiB",
         "temporary MiB", "compile s")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Compile and print row by row."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark.tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", default="v5e:2x2", help="as in v5e:2x2, v6e:4x4")
    parser.add_argument("--encoders", default="vit_b", help="vit_t, vit_b, vit_l, vit_h")
    parser.add_argument("--sizes", default="512,1024", help="image sizes in pixels")
    parser.add_argument("--batches", default="1", help="images of one chip")
    parser.add_argument("--attention", default="naive,auto", help="of config.model")
    parser.add_argument("--remat", default="none", help="of config.model")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        mesh = sharding.make_mesh(devices=topology.devices(options.topology))
        lists = (
            words(options.encoders),
            numbers("--sizes", options.sizes),
            numbers("--batches", options.batches),
            words(options.attention),
            words(options.remat),
        )
        for row in (HEADS, ["---"] * len(HEADS)):
            print("| " + " | ".join(row) + " |", flush=True)
        for point in itertools.product(*lists):
            print("| " + " | ".join(_row(options.topology, mesh, *point)) + " |", flush=True)


def _row(name: str, mesh, encoder: str, size: int, per_chip: int, attention: str, remat: str):
    config = default_config()
    config.model.update(
        encoder=encoder,
        image_size=size,
        compute_dtype="bfloat16",
        attention=attention,
        remat=remat,
    )
    config.train.batch_size = per_chip * mesh.size
    start = time.perf_counter()
    found = topology.figures(topology.compile_step(config, CLASSES, mesh))
    bytes_of = (f"{count / 2**20:.0f}" for count in (found.arguments, found.temporaries))
    seconds = f"{time.perf_counter() - start:.0f}"
    return [name, encoder, str(size), str(per_chip), attention, remat, *bytes_of, seconds]


if __name__ == "__main__":
    main()
