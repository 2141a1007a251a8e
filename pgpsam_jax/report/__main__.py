"""`python -m pgpsam_jax.report FOLDER`: the report of a run or an experiment grid."""

from pgpsam_jax.runtime.cli import Parser, running

_TEXT = """
Write FOLDER/report/report.html, one self-contained page about a run or an experiment grid (finished
or not), and every figure as PNG, PDF and CSV beside it.

Examples:
  python -m pgpsam_jax.report runs/phantom
  python -m pgpsam_jax.report runs/table3
"""


def main(arguments=None) -> None:
    parser = Parser("pgpsam_jax.report", _TEXT)
    parser.add_argument("folder", help="workdir of a run, or folder of an experiment grid")
    parser.add_argument("--data", metavar="ROOT", help="folder of the data set, if it has moved")
    parser.add_argument(
        "--base", metavar="STEM", help="converted SAM weights of the run, if they have moved"
    )
    with running():
        options = parser.parse_args(arguments)
        from pgpsam_jax.report.page import write_report  # after --help: it imports JAX

        print(write_report(options.folder, data=options.data, base=options.base))


if __name__ == "__main__":
    main()
