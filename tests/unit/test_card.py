"""The model card of a result: what the hub reads of it, what people read, and what becomes of the base model's own."""

import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from runs import SETTINGS, TOKENS
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import convexprune
from convexprune import _cli as cli
from convexprune import errors
from convexprune._api import calls
from convexprune._cli.pruning import summary
from convexprune._rendering.card import card, code, fenced, hub_name, sparsity_settings
from convexprune._rendering.facts import command_of, facts, reason
from convexprune.recipe import make_recipe
from convexprune.report import OperatorReport, Report

MAGNITUDE: dict[str, Any] = SETTINGS | {"method": "magnitude"}
BASE = "---\nlicense: llama3.2\nlicense_name: Llama 3.2\nlanguage:\n- en\n- de\nbase_model: some/other\n---\n# Dense\n"


@pytest.fixture(scope="module")
def base(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a card and a licence."""
    folder = Path(shutil.copytree(dense, tmp_path_factory.mktemp("base") / "dense [1]"))
    (folder / "README.md").write_text(BASE)
    (folder / "LICENSE.txt").write_text("All rights.")
    return folder


@pytest.fixture(scope="module")
def result(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "out"
    convexprune.prune(base, output_dir=folder, evaluation=TOKENS, **MAGNITUDE)
    return folder


def _report(folder: Path) -> Report:
    return Report.from_json((folder / "report.json").read_text())


def _metadata(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def test_the_card_says_what_the_report_says(result: Path):
    report, text = _report(result), (result / "README.md").read_text()
    assert text == card(report)
    data = _metadata(text)
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["sparsity"] == round(report.sparsity, 6) and {"pruned", "sparse", "unstructured"} <= set(data["tags"])
    (found,) = data["model-index"][0]["results"]
    measured = {metric["name"]: metric["value"] for metric in found["metrics"]}
    dense, pruned = (report.perplexity[name] for name in ("dense", "pruned"))
    assert measured == {
        "perplexity, dense": round(dense["value"], 4), "perplexity, pruned": round(pruned["value"], 4),
        "kl divergence from dense, pruned": round(pruned["kl"], 4),
    }  # fmt: skip
    assert "base_model" not in data  # a folder is no name on the hub, and a path would leak
    assert str(result.parent) not in text and str(Path.home()) not in text
    for said in ("64 tokens that the caller gave", "5 windows of 16 tokens", "held-out error", "in 28 operators"):
        assert said in text.replace("\\", ""), said


def test_the_terminal_and_the_card_say_the_same_words(result: Path):
    report = _report(result)
    cells = [list(column.cells) for column in summary(report).columns]
    told = dict(zip(*cells, strict=True))
    text = (result / "README.md").read_text().replace("\\", "")
    for fact in facts(report):
        assert told[fact.name] == fact.text and f"| {fact.name} | {fact.text} |" in text
    assert "peak memory" in told and "MB on disk" in str(told["time, size"])


def test_the_licence_of_the_base_is_kept_and_its_card_goes_along(base: Path, result: Path, tmp_path: Path):
    data = _metadata((result / "README.md").read_text())
    assert data["license"] == "llama3.2" and data["license_name"] == "Llama 3.2" and data["language"] == ["en", "de"]
    assert (result / "README-base.md").read_text() == BASE and (result / "LICENSE.txt").read_text() == "All rights."
    assert {"README-base.md", "LICENSE.txt"} <= _report(result).files.keys()
    text = (result / "README.md").read_text()
    assert "`LICENSE.txt`, `README-base.md`" in text and "that of the base model: Llama 3.2" in text
    again = tmp_path / "again"  # each base keeps its own card
    convexprune.prune(result, output_dir=again, sparsity=0.7, **SETTINGS)
    assert (again / "README-base.md").read_text() == text and (again / "README-base-base.md").read_text() == BASE
    assert _metadata((again / "README.md").read_text())["license"] == "llama3.2"


def test_so_it_is_of_a_model_that_was_loaded_whole(base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(base)
    convexprune.prune(model, output_dir=tmp_path / "out", **SETTINGS)
    assert (tmp_path / "out" / "README-base.md").read_text() == BASE
    assert _metadata((tmp_path / "out" / "README.md").read_text())["license"] == "llama3.2"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["sparsity_config"] == model.config.sparsity_config


@pytest.mark.parametrize(
    "text", ["---\nlicense: [\n---\n", "---\n" * 5, "\0\xff", "---\nlicense: {a: b}\nlanguage: 5\n---\n", "no metadata"]
)
def test_a_base_card_that_cannot_be_read_names_no_licence(dense: Path, tmp_path: Path, text: str):
    base = Path(shutil.copytree(dense, tmp_path / "dense"))
    (base / "README.md").write_bytes(text.encode("latin-1"))
    report = convexprune.prune(base, output_dir=tmp_path / "out", **MAGNITUDE).report
    assert report.base == {"files": ["README-base.md"]}
    assert (tmp_path / "out" / "README-base.md").read_bytes() == text.encode("latin-1")
    assert "does not name its licence" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_card_that_leads_elsewhere_is_refused_before_any_work(dense: Path, tmp_path: Path):
    base = Path(shutil.copytree(dense, tmp_path / "dense"))
    (tmp_path / "secret").write_text("mine")
    (base / "README.md").symlink_to(tmp_path / "secret")
    for model in (base, AutoModelForCausalLM.from_pretrained(base)):
        with pytest.raises(errors.ModelError, match=r"README.md is a link to .*secret"):
            convexprune.prune(model, output_dir=tmp_path / "out", **SETTINGS)


def test_the_config_names_the_sparsity_and_is_no_quantized_models(result: Path):
    written = json.loads((result / "config.json").read_text())
    assert not {"quantization_config", "compression_config"} & written.keys()  # what loaders look for
    config = AutoConfig.from_pretrained(result)
    assert config.sparsity_config == sparsity_settings(_report(result))["sparsity_config"] | {
        "format": "dense", "sparsity_structure": "unstructured", "global_sparsity": 0.5, "ignore": ["lm_head"],
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(result)
    assert getattr(model, "hf_quantizer", None) is None and not getattr(model, "is_quantized", False)


def test_a_model_that_was_pruned_in_memory_says_so_when_it_is_saved(dense: Path, tmp_path: Path):
    result = convexprune.prune(AutoModelForCausalLM.from_pretrained(dense), pattern="2:4", **SETTINGS)
    result.model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").sparsity_config["sparsity_structure"] == "2:4"


def test_quantization_is_no_sparsity(build, tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "dense")
    grid: dict[str, Any] = {"sparsity": 0, "quantize": "int4", "group_size": 32, "ignore": ["down_proj"]}
    convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "out", **SETTINGS | grid)
    text = (tmp_path / "out" / "README.md").read_text()
    data = _metadata(text)
    assert "int4 in groups of 32, by descent" in text and "| zeros |" in text
    assert "sparse" not in data["tags"] and "sparsity" not in data
    assert "sparsity_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_second_run_leaves_no_sparsity_of_the_first(build, tmp_path: Path):
    grid: dict[str, Any] = MAGNITUDE | {"sparsity": 0, "quantize": "int4", "group_size": 32, "ignore": ["down_proj"]}
    model = build("llama")
    convexprune.prune(model, pattern="2:4", **MAGNITUDE).model.save_pretrained(tmp_path / "sparse")
    convexprune.prune(tmp_path / "sparse", output_dir=tmp_path / "streamed", **grid)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    convexprune.prune(loaded, output_dir=tmp_path / "whole", **grid)
    convexprune.prune(model, **grid).model.save_pretrained(tmp_path / "memory")
    assert "sparsity_config" in json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert not hasattr(loaded.config, "sparsity_config")
    for name in ("streamed", "whole", "memory"):
        assert "sparsity_config" not in json.loads((tmp_path / name / "config.json").read_text())


def test_a_model_without_some_of_its_channels_is_not_sparse(dense: Path, tmp_path: Path):
    settings: dict[str, Any] = MAGNITUDE | {"pattern": "channels:8", "sparsity": 0.34}
    report = convexprune.prune(dense, output_dir=tmp_path / "out", **settings).report
    text = (tmp_path / "out" / "README.md").read_text()
    assert "a smaller dense model" in text and "sparsity" not in _metadata(text) and "| removed |" in text
    assert "| zeros |" not in text
    assert report.narrowed and "sparsity_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_others_do_with_the_card_is_theirs(dense: Path, tmp_path: Path):
    out = tmp_path / "out"
    convexprune.prune(dense, output_dir=out, **SETTINGS)
    (out / "README.md").write_text("mine")
    assert convexprune.prune(dense, output_dir=out, resume=True, **SETTINGS).report.files
    assert (out / "README.md").read_text() == "mine"


HOSTILE = "a|b`c```\n---\nlicense: x\n---\n<script>*_x_*</script> [l](http://e)"


def hostile() -> Report:
    """A report in which every text from outside wants to be markup."""
    recipe = make_recipe(model=HOSTILE, dataset=HOSTILE, evaluation=HOSTILE).model_dump(mode="json")
    operator = OperatorReport(
        HOSTILE, 4, 8, 16, 16, HOSTILE, 0.1, 0.3, 1e-5, 1e-5, 1e-6, HOSTILE, 1, 1, {HOSTILE: 1.0}, 4, 2, 1.0,
        {"ratio": 0.5},
    )  # fmt: skip
    figures = {"value": 12.5, "nll": 2.5, "tokens": 15, "windows": 1, "window": 16, "stride": 16}
    return Report(
        recipe | {"pattern": HOSTILE}, {HOSTILE: HOSTILE}, {"convexprune": HOSTILE}, [operator], {HOSTILE: 1.0},
        {"dense": figures}, warnings=[HOSTILE], base={"license": HOSTILE, "files": [HOSTILE]}, bytes=10,
    )  # fmt: skip


def test_names_from_outside_are_no_markup():
    text = card(hostile())
    data = _metadata(text)
    assert data["license"] == HOSTILE and "|" not in data["tags"][-1] and "base_model" not in data
    shown = MarkdownIt("commonmark").enable("table").render(text.partition("\n---\n\n# ")[2])
    kinds = Counter(re.findall("<[a-z0-9]+", shown))
    assert "&lt;script&gt;" in shown and kinds["<h2"] == 5 and kinds["<table"] == 1 and kinds["<pre"] == 3
    assert kinds["<td"] == 2 * (kinds["<tr"] - 1) and not kinds.keys() & {"<script", "<em", "<strong", "<a", "<hr"}


@pytest.mark.parametrize("text", ["`", "a``b", "```", "\n```sh\n"])
def test_no_backtick_ends_code(text: str):
    longest = max(len(run) for run in text.replace("\n", " ").split(" ") for run in [run.strip("abcsh")])
    assert code(text).startswith("`" * (longest + 1)) and code(text).endswith("`" * (longest + 1))
    assert fenced(text, "sh").splitlines()[-1] not in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/opt-125m", "facebook/opt-125m"), ("gpt2", "gpt2"), ("/home/me/model", None), ("opt-books", None),
        ("LlamaForCausalLM given by the caller", None), ("a/b/c", None), ("x--y", None), (None, None),
        ("folder/model.gguf", None),
    ],
)  # fmt: skip
def test_only_names_of_the_hub_are_linked(name: Any, expected: str | None):
    assert hub_name(name) == expected


def test_the_hub_is_told_base_model_and_data_set(result: Path):
    report = _report(result)
    report.recipe = report.recipe | {"model": "facebook/opt-125m", "dataset": "c4"}
    data = _metadata(card(report))
    assert (data["base_model"], data["base_model_relation"]) == ("facebook/opt-125m", "finetune")
    assert data["datasets"] == ["allenai/c4"]


RECIPES: list[dict[str, Any]] = [
    {}, {"model": "facebook/opt-125m", "sparsity": 0.6, "dataset": "c4", "seed": 3},
    {"pattern": "2:4", "method": "sparsegpt", "method_args": {"damping": 0.1}, "ignore": ("a b", "re:.*x'y")},
    {"prefix": "pruned", "error_correction": 1.0, "refit": False, "solver": "admm", "dtype": "bfloat16"},
    {"rules": ({"targets": ["re:.*0"], "sparsity": 0.2}, {"targets": ["q'1"], "method": "wanda"}), "sparsity": 0.4},
    {"targets": ("q_proj", "k_proj"), "quota": "row", "bound_rows": 0, "evaluation": "self", "threads": 2},
]  # fmt: skip


@pytest.mark.parametrize("settings", RECIPES)
def test_the_command_is_that_of_the_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    recipe = make_recipe(**{"model": "gpt2", **settings})
    command = command_of(Report(recipe.model_dump(mode="json"), {}, {}), "DIR")
    assert command is not None
    given: dict[str, Any] = {}

    def prune(recipe: None, output_dir: Path, **settings: Any) -> None:
        given.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(calls, "prune", prune)
    CliRunner().invoke(cli.app, shlex.split(command)[1:])
    if "evaluation" not in settings:
        given.pop("evaluation", None)  # on the command line it is measured on what the model writes
    assert make_recipe(**given) == recipe


def test_what_was_in_memory_has_no_command(result: Path):
    assert command_of(_report(result), "DIR") is None
    own = make_recipe().model_dump(mode="json") | {"solver": "MySolver"}
    assert command_of(Report(own, {}, {}), "DIR") is None
    assert "It was pruned in Python" in (result / "README.md").read_text()


def test_the_reason_of_an_error_is_of_its_operator(result: Path):
    report = _report(result)
    o = replace(report.operators[0], status="SOLVED", tokens=100, relative_error=0.1, held_out_error=0.1)
    assert reason(replace(o, status="ITERATIONS"), report).endswith("ended as ITERATIONS")
    assert reason(replace(o, tokens=9), report) == "only 9 calibration tokens for 16 inputs"
    assert "5.0 times" in reason(replace(o, held_out_error=0.5), report)
    assert "no pruning has less than 0.90" in reason(replace(o, bound={"ratio": 0.9}), report)
    alike = replace(report, operators=[replace(o, relative_error=e, held_out_error=e) for e in (0.01, 0.02, 0.1)])
    assert reason(o, alike) == "its layer: 5.0 times the median of all q_proj"
    assert reason(o, replace(alike, operators=[o, o])) == "its place: q_proj has such errors in most layers"
