"""`--json`, `--quiet`, `--dry-run`, and a report elsewhere: what a command prints and leaves."""

import json
from pathlib import Path
from typing import Any

import yaml
from door import TOKENS
from test_cli import folder, run

import convexprune

__all__ = ["folder"]  # a fixture of test_cli

SMALL = ("--method", "magnitude", "--nsamples", 2, "--seqlen", 8)


def test_json_is_one_object_on_stdout(folder: Path) -> None:
    text = folder / "text.txt"
    given = ("prune", "--model", folder / "model", "--dataset", text, *SMALL, "--save", folder / "logs")
    done = run(*given, "--json", "--output", folder / "out")
    found = json.loads(done.stdout)
    assert found["output_dir"] == str(folder / "out") and len(found["report"]["operators"]) == 12
    assert "pruned 12/12" in done.stderr
    for name in ("report.json", "recipe.yaml"):
        assert (folder / "logs" / name).read_text() == (folder / "out" / name).read_text()
    refused = run(*given, "--output", folder / "out2")
    assert "already holds report.json and recipe.yaml" in str(refused.exception) and not (folder / "out2").exists()
    assert json.loads(run("pack", folder / "out", folder / "packed", "--json").stdout)["after"] > 0
    assert json.loads(run("unpack", folder / "packed", folder / "plain", "--json").stdout)["output_dir"]
    assert "wanda" in json.loads(run("list", "--json").stdout)["methods"]


def test_quiet_prints_the_result_and_nothing_else(folder: Path) -> None:
    given = ("prune", folder / "model", "--dataset", folder / "text.txt", *SMALL, "--quiet")
    done = run(*given, "--output", folder / "out")
    assert done.exit_code == 0 and done.stderr == "" and "50.00% of " in done.stdout


def test_a_dry_run_checks_everything_and_does_nothing(folder: Path) -> None:
    given = ("prune", folder / "model", *SMALL, "--dry-run", "--output", folder / "out", "--dataset")
    before = sorted(folder.rglob("*"))
    done = run(*given, folder / "text.txt")
    assert done.exit_code == 0 and "12 operators" in done.stdout, done.output
    assert json.loads(run(*given, folder / "text.txt", "--json").stdout)["operators"] == 12
    assert sorted(folder.rglob("*")) == before
    short = folder / "short.txt"
    short.write_text("Too short.")
    assert "full windows" in str(run(*given, short).exception)
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").touch()
    assert "already holds something" in str(run(*given, folder / "text.txt").exception)


def test_reports_of_a_run_in_memory_are_kept_where_the_caller_wants(build, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataset": TOKENS, "method": "magnitude", "nsamples": 4, "bound_rows": 0}
    result = convexprune.prune(build("llama"), **settings, report_dir=tmp_path / "logs")
    kept = json.loads((tmp_path / "logs" / "report.json").read_text())
    assert kept["sparsity"] == result.report.sparsity
    assert yaml.safe_load((tmp_path / "logs" / "recipe.yaml").read_text())["method"] == "magnitude"
