"""The result of a call from Python: it shows itself, and is saved whole or not at all."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SETTINGS, TOKENS
from transformers import AutoModelForCausalLM

import convexprune
from convexprune.errors import OutputError
from convexprune.report import DERIVED


def test_a_result_in_memory_shows_its_facts_and_is_saved_as_a_run_is(build, tokenizer, tmp_path: Path):
    result = convexprune.prune(build("llama"), tokenizer=tokenizer, **SETTINGS)
    assert "<th>zeros</th>" in result._repr_html_() and "zeros" in str(result)
    assert "self_attn.q_proj" in result.report._repr_html_()
    saved = result.save(tmp_path / "DIR")
    names = {"README.md", "config.json", "recipe.yaml", "report.html", "report.json", "tokenizer.json"}
    assert names <= {path.name for path in saved.iterdir()} and not list(tmp_path.glob(".*"))
    assert convexprune.Report.from_json((saved / "report.json").read_text()).sparsity == result.report.sparsity
    weight = AutoModelForCausalLM.from_pretrained(saved).get_parameter("model.layers.0.mlp.up_proj.weight")
    assert float((weight == 0).float().mean()) == 0.5
    with pytest.raises(OutputError, match="already holds"):
        result.save(saved)
    written = convexprune.prune(saved, output_dir=tmp_path / "again", **SETTINGS)
    with pytest.raises(OutputError, match=r"lies in .*again already"):
        written.save(tmp_path / "elsewhere")


@pytest.mark.parametrize("folder", [False, True])
def test_a_result_is_pickled_with_its_model(folder: bool, build, tmp_path: Path):
    build("llama").save_pretrained(dense := tmp_path / "dense")
    pruned, permuted = (tmp_path / name if folder else None for name in ("pruned", "permuted"))
    text = dict[str, Any](dataset=TOKENS, num_calibration_samples=4)
    results = (
        convexprune.prune(dense, output_dir=pruned, **SETTINGS),
        convexprune.permute(dense, output_dir=permuted, pattern="2:4", **text),
    )
    for result in results:
        again = pickle.loads(pickle.dumps(result))
        for name, parameter in result.model.named_parameters():
            assert torch.equal(again.model.get_parameter(name), parameter)


def test_a_saved_result_has_the_record_of_what_was_removed_and_no_command_that_fails(build, tmp_path: Path):
    settings = SETTINGS | {"pattern": "channels:8", "sparsity": 0.5}
    build("llama").save_pretrained(tmp_path / "dense")
    saved = convexprune.prune(tmp_path / "dense", **settings).save(tmp_path / "DIR")
    run = convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "run", **settings).output_dir
    assert run is not None and (saved / "channels.json").read_text() == (run / "channels.json").read_text()
    assert "convexprune verify" in (run / "report.html").read_text()
    assert "convexprune verify" not in (saved / "report.html").read_text()
    with pytest.raises(OutputError, match=r"Prune into a folder \(output_dir, --output\) to verify"):
        convexprune.verify(saved, dataset=SETTINGS["dataset"], model=str(saved))


def test_recipe_and_report_have_schemas_that_know_all_that_is_written(build, tokenizer):
    recipe, schema = convexprune.Recipe.model_json_schema(), convexprune.Report.json_schema()
    report = convexprune.prune(build("llama"), tokenizer=tokenizer, **SETTINGS).report
    written = json.loads(report.to_json())
    assert recipe["properties"].keys() == report.recipe.keys() and schema["properties"].keys() == written.keys()
    assert schema["$defs"]["OperatorReport"]["properties"].keys() == written["operators"][0].keys()
    assert all(schema["properties"][name]["description"] for name in (*DERIVED, "checksum"))
    report.operators[0].facts["growth"] = float("inf")
    number = schema["$defs"]["OperatorReport"]["properties"]["facts"]["additionalProperties"]
    assert json.loads(report.to_json())["operators"][0]["facts"]["growth"] in str(number)
    json.dumps([recipe, schema])
