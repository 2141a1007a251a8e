"""`python -m pgpsam_jax.report RUN_OR_GRID`: write the report of a run or a grid."""

from pgpsam_jax.runtime.cli import Parser, running

_TEXT = """
Write one self-contained HTML page about a run or a grid, finished or not, with every figure also as
PNG, PDF and CSV beside it: FOLDER/report/report.html.

Examples:
  python -m pgpsam_jax.report runs/phantom
  python -m pgpsam_jax.report runs/table3
"""


def main(arguments=None) -> None:
    parser = Parser("pgpsam_jax.report", _TEXT)
    parser.add_argument("folder", help="workdir of pgpsam_jax.main, or folder of a grid")
    parser.add_argument(
        "--data", metavar="ROOT", help="folder of the data set, if the run cannot find it"
    )
    parser.add_argument(
        "--base", metavar="STEM", help="converted SAM of the run, if the run cannot find it"
    )
    with running():
        options = parser.parse_args(arguments)
        from pgpsam_jax.report.page import write_report  # after --help: it imports JAX

        print(write_report(options.folder, data=options.data, base=options.base))


if __name__ == "__main__":
    main()
