"""Files that other programs read: citation, commit hooks and the workflow of public CI."""

import re
import tomllib

import yaml

from tests.support.places import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def load(name: str):
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_citation_names_the_software_and_the_paper():
    """The keys that the format (CFF 1.2.0) requires of the file and of a reference."""
    cited = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["title"] == "pgpsam_jax"
    assert cited["license"] == PROJECT["project"]["license"]
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["title"] in " ".join((REPOSITORY / "docs/paper.md").read_text().split())
    for author in paper["authors"]:
        assert author.keys() == {"family-names", "given-names"}


def test_hooks_of_a_commit_need_no_network():
    (source,) = load(".pre-commit-config.yaml")["repos"]
    assert source["repo"] == "local"
    assert all(hook["language"] == "system" for hook in source["hooks"])
    programs = [hook["entry"].split()[0] for hook in source["hooks"]]
    assert programs == ["ruff", "ruff", "mypy"]
    dev = " ".join(EXTRAS["dev"] + EXTRAS["test-core"])
    assert all(name in dev for name in {*programs, "pre-commit"})


def test_the_workflow_runs_what_contributors_run():
    workflow = load(".github/workflows/ci.yml")
    jobs = workflow["jobs"]
    assert set(workflow[True]) >= {"push", "pull_request", "schedule"}  # YAML reads `on` as true
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for job in jobs.values():
        install, *checks = commands(job)
        (extras,) = re.findall(r"pip install -e '\.\[([\w,]+)\]'", install)
        assert set(extras.split(",")) <= EXTRAS.keys()
        assert checks and [line for line in checks if line not in contributing] == []
    versions = jobs["tests"]["strategy"]["matrix"]["python-version"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
