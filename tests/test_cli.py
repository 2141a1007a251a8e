"""The command `pgpsam`: its subcommands, names of shipped files, and the help of `train`."""

import subprocess
import sys

import pytest

from pgpsam_jax import cli, main
from pgpsam_jax.config import default_config, overrides
from pgpsam_jax.config.field_help import describe_fields, field_comments
from pgpsam_jax.config.serialization import flatten
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.errors import UserError
from pgpsam_jax.version import __version__
from tests.support.launcher import environment
from tests.support.places import REPOSITORY


@pytest.fixture
def pgpsam(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code and output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["pgpsam", *words])
        monkeypatch.setattr(cli, "begin", lambda: None)  # it is for a process of its own
        try:
            code = cli.main()
        except SystemExit as ended:
            code = ended.code
        return code or 0, *capsys.readouterr()

    return run


def test_help_and_version(pgpsam):
    code, text, _ = pgpsam("--help")
    assert code == 0 and all(f"  {name} " in text for name in cli.COMMANDS if name != "cell")
    assert pgpsam()[1] == text
    assert pgpsam("--version") == (0, f"pgpsam_jax {__version__}\n", "")


def test_unknown_command(pgpsam):
    code, _, error = pgpsam("trian")
    assert code == 2 and "did you mean train?" in error
    assert "pgpsam --help lists them" in pgpsam("7")[2]


def test_light_before_a_command():
    """`pgpsam --help` imports neither JAX nor any other package that is slow to import."""
    program = "import sys\nfrom pgpsam_jax import cli\ncli.main()\nprint(*sys.modules)"
    command = [sys.executable, "-c", program, "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    modules = ended.stdout.splitlines()[-1].split()
    assert not {"jax", "numpy", "absl", "ml_collections", "argparse"} & set(modules)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_names_itself_in_its_help(name, tmp_path):
    """In another folder, where the repository is not to be found by chance."""
    command = [sys.executable, "-m", "pgpsam_jax.cli", name, "--help"]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment(1)}
    ended = subprocess.run(command, **options)
    assert ended.returncode == 0, ended.stderr
    assert f"usage: pgpsam {name}" in ended.stdout
    assert "python -m pgpsam_jax" not in ended.stdout


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and describe_fields() in text
    comments, fields = field_comments(), flatten(default_config().to_dict())
    assert not [field for field in fields if not comments.get(field)]
    assert "--config.model.k=4 " in text and "--config.model.lora_targets=q,v " in text


def test_files_by_name(tmp_path, monkeypatch):
    """Shipped files are found from any folder; a file of the user comes first."""
    monkeypatch.chdir(tmp_path)
    assert overrides.load_file("phantom") == overrides.load_file("configs/phantom.py")
    assert overrides.load_file("abdomen_ct").data.label_table == "configs/labels/abdomen_ct.json"
    assert "liver" in load_label_table("configs/labels/abdomen_ct.json").names
    (tmp_path / "phantom").write_text("")
    with pytest.raises(UserError, match="phantom is not a Python file"):
        overrides.load_file("phantom")
    with pytest.raises(UserError, match=r"config fantom not found; did you mean phantom\?"):
        overrides.load_file("fantom")
    with pytest.raises(UserError, match=r"grid xyz not found; known names: .*table1, table2"):
        overrides.load_function("xyz", "get_grid", "grid")
