"""What a release is made of: its versions agree, and the image runs the README's two commands."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def released(tag: str) -> "subprocess.CompletedProcess[str]":
    given = os.environ | {"PYTHON": sys.executable, "BUILD_OPTIONS": "--no-isolation"}
    return subprocess.run([ROOT / ".ci" / "release", tag], env=given, capture_output=True, text=True)


def test_a_tag_that_is_not_the_version_is_no_release():
    refused = released("v99")
    assert refused.returncode == 1 and f"The tag is v99, the version in pyproject.toml is {VERSION}" in refused.stdout


def test_a_release_takes_its_fragments_and_has_a_tag(tmp_path: Path):
    for name in (".ci/release", "pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "changelog.d" / "+new.added.md").write_text("Something new.\n")
    variables = {f"GIT_{role}_{key}": "a" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    given = os.environ | variables | {"PYTHON": sys.executable}

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=given, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "before")
    subprocess.run([tmp_path / ".ci" / "release", "prepare", "7.8.9"], env=given, check=True, capture_output=True)
    assert git("tag").split() == ["v7.8.9"] and git("status", "--porcelain") == ""
    log = (tmp_path / "CHANGELOG.md").read_text()
    assert log.index("## [7.8.9]") < log.index("Something new.") < log.index("## [0.1.0]")
    assert 'version = "7.8.9"' in (tmp_path / "pyproject.toml").read_text()
    assert not (tmp_path / "changelog.d" / "+new.added.md").exists()


@pytest.mark.slow
def test_a_tag_gives_a_wheel_and_an_sdist_that_are_whole():
    assert released(f"v{VERSION}").returncode == 0
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as source, zipfile.ZipFile(wheel) as built:
        inside = {name.partition("/")[2] for name in source.getnames()} & set(built.namelist())
    names = ("adapters/__init__.py", "validation/__init__.py", "data/opt-books/model.safetensors")
    assert {f"convexprune/{name}" for name in names} <= inside


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == VERSION and cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_the_workflow_releases_what_a_tag_says():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    flow = yaml.safe_load(text)
    assert flow[True] == {"push": {"tags": ["v*"]}}  # YAML takes `on` for true
    steps = [step["run"] for step in flow["jobs"]["build"]["steps"] if "run" in step]
    assert '.ci/release "$GITHUB_REF_NAME"' in steps and ".ci/run" in steps


def test_every_push_and_pull_request_runs_ci():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert flow[True] == {"push": {"branches": ["**"]}, "pull_request": None}
    assert ".ci/run" in [step.get("run") for step in flow["jobs"]["run"]["steps"]]


def test_before_a_commit_the_checks_are_those_of_ci():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {each["repo"].rpartition("/")[2]: each["rev"].removeprefix("v") for each in repositories}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ruff=={revisions['ruff-pre-commit']}" in project["optional-dependencies"]["lint"]
    assert {"end-of-file-fixer", "ruff-format", "codespell"} <= {
        h["id"] for each in repositories for h in each["hooks"]
    }


def test_the_image_runs_both_commands_of_the_readme():
    """What a stage installs and what its container runs make one command of the README together."""
    stages = re.findall(r"^FROM base.*\nRUN (.+)\nCMD (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    made = {f"{run} && {' '.join(json.loads(command))}" for run, command in stages}
    assert made == set(re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE))


def test_what_the_image_leaves_out_is_made_again_in_it():
    left_out = set((ROOT / ".dockerignore").read_text().split())
    assert ".venv" in left_out and left_out <= {
        *(ROOT / ".gitignore").read_text().replace("/", "").split(),
        ".git",
        "**/__pycache__",
        "**/*.egg-info",
    }
