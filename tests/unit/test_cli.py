"""The command line says what it did, and what is wrong."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from convexprune import _cli as cli
from convexprune import errors
from convexprune._cli import application
from convexprune._schema.presets import PRESETS
from convexprune._storage.failures import writing
from convexprune.adapters import TESTED, HuggingFaceModel
from convexprune.pruners import PRUNERS
from convexprune.solvers import solver_names
from convexprune.validation._variants import CONVENTIONS

TEXT = "It was the best of times, it was the worst of times. " * 200


@pytest.fixture
def folder(tiny_opt: HuggingFaceModel, tmp_path: Path) -> Path:
    tiny_opt.model.save_pretrained(tmp_path / "model")
    assert tiny_opt.tokenizer is not None
    tiny_opt.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(*arguments: object):
    return CliRunner(env={"COLUMNS": "140"}).invoke(cli.app, [str(a) for a in arguments])


def test_list_names_all_that_can_be_chosen():
    result = run("list")
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "cg, for refits, not prune --solver; takes a fixed support" in printed
    assert "working-set, for solve, not prune --solver; takes L1, ElasticNet" in printed
    for names in (TESTED.values(), PRUNERS, solver_names(), PRESETS, ("unstructured", "2:4")):
        assert all(name in printed for name in names)


def test_prune_prints_the_table_and_where_the_model_lies(folder: Path):
    options = ["--pattern", "2:4", "--nsamples", 8, "--seqlen", 32, "--output", folder / "out"]
    text = folder / "text.txt"
    result = run("prune", folder / "model", "--dataset", text, "--evaluation", text, *options)
    assert result.exit_code == 0, result.output
    assert "50.00% of " in result.stdout and "12 operators" in result.stdout
    words = " ".join(result.stdout.split())
    assert "perplexity dense " in words and ", pruned " in words and "tokens of the text" in words
    assert str(folder / "out") in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if str(folder) not in line), result.stdout
    assert "pruned 6/12" in result.stderr and "about 0:00:0" in result.stderr and "layers.0: error" in result.stderr
    assert {"recipe.yaml", "report.json", "model.safetensors"} <= {p.name for p in (folder / "out").iterdir()}


def test_eval_states_what_the_number_depends_on(folder: Path):
    result = run("eval", folder / "model", "--text", folder / "text.txt", "--window", 32, "--max-windows", 2)
    assert result.exit_code == 0, result.output
    assert "2 x 32" in result.output and "given" in result.output


def test_eval_without_a_model_is_of_the_bundled_one(folder: Path):
    result = run("eval", "--text", folder / "text.txt", "--window", 32, "--max-windows", 1)
    assert result.exit_code == 0 and "perplexity" in result.stdout, result.output


def test_an_error_is_one_message_and_status_two(folder: Path, monkeypatch, capsys):
    arguments = ["convexprune", "prune", str(folder / "model"), "--method", "wando", "--output", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "RecipeError: Unknown method 'wando'. Did you mean 'wanda'?" in capsys.readouterr().err


def test_errors_have_names_that_python_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def full(*_: Any) -> None:
        with writing(tmp_path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "_run", full)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith(f"OutputError: {tmp_path} cannot be written")


def test_a_current_folder_that_was_removed_is_one_message(tmp_path: Path):
    (tmp_path / "gone").mkdir()
    code = f"import os; os.rmdir({str(tmp_path / 'gone')!r}); from convexprune.__main__ import run; run()"
    done = subprocess.run([sys.executable, "-c", code, "list"], cwd=tmp_path / "gone", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "The current folder was removed. Change to another one (cd).\n")


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_wait_asleep_unless_the_environment_says_how(said: dict[str, str], expected: str):
    """OpenMP reads the variable as torch is imported, so it must be there before the command line is."""
    code = (
        "import os, sys, types; from convexprune.__main__ import run; fake = types.ModuleType('fake'); "
        "fake.main = lambda: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules); "
        "sys.modules['convexprune._cli'] = fake; run()"
    )
    rest = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=rest | said, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{expected} False\n", "")


def test_a_closed_output_loses_what_is_printed_and_nothing_else():
    command = f"exec {sys.executable} -m convexprune list >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("command", ["list", "--version"])
def test_a_full_disk_that_is_printed_to_is_named(command: str):
    done = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m convexprune {command} > /dev/full"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("OutputError: No space left on device, where this command")
    assert done.stderr.count("\n") == 1


def test_brackets_of_a_message_are_not_markup(folder: Path, monkeypatch, capsys):
    said = "needs Ray: pip install 'convexprune[ray]', or a tensor [windows tokens] [/x]"

    def fail(**_: object):
        raise errors.DependencyError(said)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert said in capsys.readouterr().err
    monkeypatch.undo()
    output = folder / "pruned [1]"
    result = run("prune", folder / "model", "--method", "magnitude", "--nsamples", 2, "--seqlen", 8, "--output", output)
    assert str(output) in result.output and result.exit_code == 0, result.output


def test_eval_has_windows_that_the_model_can_see(folder: Path):
    result = run("eval", folder / "model", "--text", folder / "text.txt", "--max-windows", 1)
    assert result.exit_code == 0 and "1 x 64 common, native" in " ".join(result.output.split())


def test_the_help_of_compare_names_every_convention():
    result = CliRunner().invoke(cli.app, ["compare", "--help"], env={"COLUMNS": "400"})
    assert [name for name in CONVENTIONS if name not in result.output] == []


def test_compare_takes_several_seeds_and_refuses_what_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(application, "console", Console(width=60))  # of a narrow terminal: no number is cut
    given = ("compare", folder / "model", "--methods", "magnitude", "--nsamples", 2, "--seqlen", 16, "--no-plots")
    given += ("--eval-text", folder / "text.txt", "--eval-window", 16, "--eval-windows", 1)
    result = run(*given, "--seed", "0,1", "--output", folder / "compared")
    assert result.exit_code == 0 and "1 variants on 2 samples" in result.output, result.output
    (row,) = (line for line in result.output.splitlines() if "dense-none" in line)
    assert "…" not in row and row.split()[-3:] == ["1.000", "±", "0.000"]
    assert (folder / "compared" / "seed-1" / "report.md").is_file()
    result = run(*given, "--seed", "0,x", "--output", folder / "not")
    assert "seeds.1='x'" in str(result.exception) and not (folder / "not").exists()


def test_threads_are_left_as_the_user_set_them(folder: Path):
    threads = torch.get_num_threads()
    given = ("--method", "magnitude", "--nsamples", 2, "--seqlen", 8, "--output", folder / "out")
    result = run("prune", folder / "model", *given, "--threads", threads + 1)
    assert result.exit_code == 0 and torch.get_num_threads() == threads


def test_every_command_has_examples_that_its_options_admit():
    commands = get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert set(application.EXAMPLES) == set(commands)
    for name, examples in application.EXAMPLES.items():
        for example in examples:
            commands[name].make_context(name, shlex.split(example)[1:])
