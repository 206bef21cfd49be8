"""What people who come from wanda, SparseGPT, llm-compressor and others have in their fingers: a row for each habit."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import folder
from typer.testing import CliRunner

import convexprune
from convexprune import _cli as cli
from convexprune import errors
from convexprune._api import calls
from convexprune._schema import functions as doors
from convexprune._schema.settings import Rule
from convexprune.recipe import make_recipe

__all__ = ["folder"]  # a fixture of test_cli


class Asked(Exception):
    """What a command line came to."""


def asked(*arguments: str, function: str = "prune") -> dict[str, Any]:
    """The settings that a command line gives to the function of that name, which does not run."""

    def stop(**settings: Any) -> None:
        raise Asked(settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, function, stop)
        result = CliRunner().invoke(cli.app, ["prune", *arguments])
    assert isinstance(result.exception, Asked), result.output
    (settings,) = result.exception.args
    return settings


WANDA = (
    "--prune_method wanda --sparsity_ratio 0.5 --sparsity_type 2:4 --nsamples 128 --seed 0 --save D --save_model E "
    "--model X"
)


def a_wanda_line() -> None:
    settings = asked(*WANDA.split())
    expected = {"model": "X", "method": "wanda", "sparsity": 0.5, "pattern": "2:4", "num_calibration_samples": 128}
    expected |= {"seed": 0, "report_dir": Path("D"), "output_dir": Path("E")}
    assert {name: settings[name] for name in expected} == expected


def model_as_an_option() -> None:
    assert asked("--model", "X")["model"] == asked("X")["model"] == "X"
    result = CliRunner().invoke(cli.app, ["prune", "X", "--model", "Y"])
    assert "The model came twice: 'X' and --model 'Y'." in str(result.exception)


def names_of_wanda() -> None:
    settings = asked("--prune-method", "magnitude", "--sparsity-ratio", "0.3", "--sparsity-type", "unstructured")
    assert (settings["method"], settings["sparsity"], settings["pattern"]) == ("magnitude", 0.3, "unstructured")


def short_names_in_python() -> None:
    own, shared = doors.PRUNE.read({"nsamples": 4, "seqlen": 8, "prune_method": "wanda", "save": "D"})
    assert shared == {"num_calibration_samples": 4, "max_seq_length": 8, "method": "wanda"}
    assert own.report_dir == Path("D")
    with pytest.raises(errors.RecipeError, match="nsamples is another name of num_calibration_samples"):
        doors.PRUNE.read({"nsamples": 4, "num_calibration_samples": 4})


def names_of_llm_compressor() -> None:
    given = {"num_calibration_samples": 4, "max_seq_length": 8, "targets": ["Linear"], "ignore": ["re:.*k_proj"]}
    _, shared = doors.PRUNE.read(given)
    assert shared == given


def underscores() -> None:
    settings = asked("--num_calibration_samples", "4", "--max_seq_length", "8", "--output_dir", "D", "--no_pack")
    assert (settings["num_calibration_samples"], settings["max_seq_length"]) == (4, 8)
    assert settings["output_dir"] == Path("D") and settings["pack"] is False
    assert asked("--output-dir", "D", "--trust_remote_code")["trust_remote_code"]


def a_recipe() -> None:
    assert asked("--recipe", "recipe.yaml")["recipe"] == Path("recipe.yaml")


def rules() -> None:
    given = ("{targets: [down_proj, 're:.*o_proj'], sparsity: 0.3}", "{targets: k_proj, pattern: 2:4}")
    settings = asked("--rule", given[0], "--rule", given[1])
    first, second = make_recipe(rules=settings["rules"]).rules
    assert first == Rule(targets=("down_proj", "re:.*o_proj"), sparsity=0.3)
    assert second == Rule(targets=("k_proj",), pattern="2:4")


def evaluation() -> None:
    own, _ = doors.EVALUATE.read({"tasks": "hellaswag,arc_easy", "text": ["wikitext2"], "against": "X"})
    assert own.tasks == ("hellaswag", "arc_easy") and own.text == ("wikitext2",)
    assert asked("--evaluation", "a.txt")["evaluation"] == "a.txt"


def several_sparsities() -> None:
    own, _ = doors.COMPARE.read({"sparsities": "0.5,0.6"})
    assert own.sparsities == (0.5, 0.6)


def completion() -> None:
    complete = {"_CONVEXPRUNE_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    offered = CliRunner().invoke(
        cli.app, prog_name="convexprune", env=complete | {"COMP_WORDS": "convexprune prune --method "}
    )
    methods = ["convex", "admm", "alps", "fistapruner", "magnitude", "sparsegpt", "wanda", "osscar"]
    methods += ["reap", "shortgpt", "wanda-sp"]
    assert offered.output.split() == methods


def the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "convexprune", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == convexprune.__version__


def the_version() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).stdout.strip() == convexprune.__version__


def short_options() -> None:
    assert CliRunner().invoke(cli.app, ["prune", "-h"]).exit_code == 0
    settings = asked("-o", "D", "-s", "0.7")
    assert settings["output_dir"] == Path("D") and settings["sparsity"] == 0.7


def a_dry_run() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "prune", None)
        assert asked("--dry_run", "-s", "0.7", function="plan")["sparsity"] == 0.7


def torchs_objects() -> None:
    recipe = convexprune.Recipe(dtype=torch.bfloat16, device=torch.device("cpu"))  # pyright: ignore
    assert (recipe.dtype, recipe.device) == ("bfloat16", "cpu")


def closed_lists() -> None:
    shown = CliRunner().invoke(cli.app, ["prune", "--help"], env={"COLUMNS": "400"}).output
    for name in ("quota", "method", "solver", "allocation", "executor", "dtype"):
        assert f"[{'|'.join(doors.PRUNE.hint(name).choices)}]" in shown
    with pytest.raises(errors.RecipeError, match="'matrix' or 'row'"):
        make_recipe(quota="rows")


def the_first_options() -> None:
    first = shown_help("prune", width=200)["Options"]
    assert len([line for line in first if re.match(r"  (-\w, )?--", line)]) == 12  # and --help
    assert list(shown_help("prune", width=200)) == ["Arguments", "Options", *GROUPS, "Examples"]


GROUPS = ("model", "data", "target", "method", "run", "device", "what is printed")


def shown_help(command: str, width: int) -> dict[str, list[str]]:
    """The lines of a command's help by the groups of its options."""
    shown = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=width).output
    return {
        name: lines.splitlines() for name, lines in re.findall(r"^([A-Za-z ]+):\n((?:  .*\n)+)", shown, re.MULTILINE)
    }


HERE: dict[str, Callable[[], None]] = {
    "wanda line pasted after `convexprune prune`": a_wanda_line,
    "`--model X` beside the positional argument": model_as_an_option,
    "`--prune_method`, `--sparsity_ratio`, `--sparsity_type`, `--save`, `--save_model`": names_of_wanda,
    "`--nsamples`, `--seqlen`, `--seed`": short_names_in_python,
    "llm-compressor's names": names_of_llm_compressor,
    "the same on the CLI": underscores,
    "recipe.yaml fed back, CLI": a_recipe,
    "per-operator rules": rules,
    "several sparsities in one run": several_sparsities,
    "zero-shot evaluation by the project": evaluation,
    "shell completion": completion,
    "`python -m convexprune`": the_module,
    "`--version`, `convexprune.__version__`": the_version,
    "`-h`, `-o`, `-s`": short_options,
    "`--dry-run`": a_dry_run,
    "torch objects: `dtype=torch.bfloat16`, `device=torch.device('cpu')`": torchs_objects,
    "closed lists are choices": closed_lists,
    "the options that people need come first": the_first_options,
}
# fmt: off
ELSEWHERE = {  # the file and the test
    "`oneshot(model, recipe=[Modifier...])`":
        "unit/test_llmcompressor.py: test_sparsegpt_as_its_page_shows_it",
    "recipe.yaml fed back, Python":
        "unit/test_schema.py: test_a_recipe_prunes_as_it_did_and_what_is_given_besides_replaces_its_own",
    "lm_eval on the pruned folder":
        "unit/test_prune.py: test_the_output_is_an_ordinary_folder_that_transformers_loads",
    "perplexity on WikiText-2, C4, PTB by name in `eval`":
        "unit/test_evaluate.py: test_what_cannot_be_measured_is_refused",
    "`--quiet`":
        "unit/test_switches.py: test_quiet_prints_the_result_and_nothing_else",
    "`--json`":
        "unit/test_switches.py: test_json_is_one_object_on_stdout",
    "`--overwrite`":
        "unit/test_overwriting.py: test_a_run_takes_the_place_of_another",
    "hub: push_to_hub":
        "unit/test_publishing.py: test_the_command_uploads",
    "model card in the output":
        "unit/test_card.py: test_the_card_says_what_the_report_says",
    "sparsity marked in config.json":
        "unit/test_card.py: test_the_config_names_the_sparsity_and_is_no_quantized_models",
    "load by plain transformers":
        "unit/test_prune.py: test_the_output_is_an_ordinary_folder_that_transformers_loads",
    "continue training, zeros kept":
        "unit/test_training.py: test_zeros_stay_zero_and_the_rest_learns",
    "HTML report or plots of one run":
        "unit/test_page.py: test_every_result_has_a_page_that_says_what_the_report_says",
    "GGUF in":
        "families/test_checkpoint.py: test_a_gguf_file_is_unpacked_pruned_and_saved_as_a_folder",
    "compressed-tensors out":
        "unit/test_export.py: test_transformers_loads_the_weights_of_the_run",
    "scikit-learn / CVXPY manners in the mathematics":
        "property/test_problems.py: test_every_solver_passes_in_one_line",
    "DataLoader of dicts / tuples, HF tokenised rows":
        "unit/test_calibration.py: test_the_same_rows_in_any_kind_give_the_same_windows",
    "`datasets.Dataset`, generators, NumPy, nested lists":
        "unit/test_calibration.py: test_the_same_rows_in_any_kind_give_the_same_windows",
    "docs site, API reference":
        "unit/test_pages.py: test_every_page_is_in_the_navigation",
    "Ctrl-C, exit codes":
        "unit/test_packaging.py: test_an_interrupt_while_the_command_line_is_loaded_is_no_traceback",
}
# fmt: on
ABSENT = ("PyPI: a release", "GGUF out", "2:4 kernels out")


@pytest.mark.parametrize("habit", HERE)
def test_a_habit_of_the_field_works(habit: str) -> None:
    HERE[habit]()


@pytest.mark.parametrize("habit", ELSEWHERE)
def test_the_test_of_another_habit_is_there(habit: str) -> None:
    file, name = ELSEWHERE[habit].split(": ")
    assert f"\ndef {name}(" in (Path(__file__).parents[1] / file).read_text()


def test_all_of_them_are_listed() -> None:
    assert len(HERE) + len(ELSEWHERE) + len(ABSENT) == 41  # 37 at first, two of ours, and what goes out is three


PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
LINES = re.findall(r"^convexprune prune (.+)$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_page_is_understood(line: str) -> None:
    settings = asked(*shlex.split(line))
    recipe = settings.pop("recipe")
    assert recipe == Path("recipe.yaml") or doors.PRUNE.read(settings)[1]["model"] == "X"


def test_the_options_that_the_page_names_are_there() -> None:
    shown = CliRunner().invoke(cli.app, ["prune", "--help"], env={"COLUMNS": "400"}).output
    shown += CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "400"}).output
    ours = PAGE.read_text().partition("What commands have in common")[2]
    named = re.findall(r"`(--?[a-z-]+)`", ours)
    assert len(named) > 7 and [option for option in named if option not in shown] == []


@pytest.mark.parametrize("command", ["prune", "compare", "eval", "inspect", "verify"])
def test_help_of_a_narrow_terminal_has_room(command: str) -> None:
    groups = shown_help(command, 80)
    lines = [line for group in groups.values() for line in group]
    assert max(len(line) for line in lines if " [" not in line) <= 80
    assert not any("…" in line for line in lines)
    assert len(lines) < 220  # 433 lines when the text had a column of 19 characters


def test_the_list_of_commands_says_a_whole_sentence_of_each() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"], terminal_width=80).output
    commands = shown.partition("Commands:\n")[2].splitlines()
    assert len(commands) > 10 and all(line.endswith(".") and not line.endswith("...") for line in commands)
