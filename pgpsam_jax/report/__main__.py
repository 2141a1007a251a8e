"""`python -m pgpsam_jax.report RUN_OR_GRID`: write the report of a run or a grid."""

import argparse

from pgpsam_jax.errors import exit_on_user_error


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pgpsam_jax.report",
        description="Write one self-contained HTML page about a run or a grid, finished or not, "
        "with every figure also as PNG, PDF and CSV beside it.",
    )
    parser.add_argument("folder", help="workdir of pgpsam_jax.main, or folder of a grid")
    parser.add_argument(
        "--data", metavar="ROOT", help="folder of the data set, if the run cannot find it"
    )
    parser.add_argument(
        "--base", metavar="STEM", help="converted SAM of the run, if the run cannot find it"
    )
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        from pgpsam_jax.report.page import write_report  # after --help: it imports JAX

        print(write_report(options.folder, data=options.data, base=options.base))


if __name__ == "__main__":
    main()
