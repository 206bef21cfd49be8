"""Recipes of llm-compressor are translated, or refused by the name of what cannot be."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from door import SMALL
from test_cli import run

import convexprune
from convexprune import errors
from convexprune._api.llmcompressor import from_llmcompressor
from convexprune._recipe_file import read_recipe

SEQUENTIAL = {"prefix": "pruned", "error_correction": 0.0}


def translated(tmp_path: Path, text: str) -> dict[str, Any]:
    (tmp_path / "theirs.yaml").write_text(text)
    return from_llmcompressor(tmp_path / "theirs.yaml")


def stage(**modifiers: Any) -> str:
    return yaml.safe_dump({"test_stage": {"pruning_modifiers": modifiers}}, sort_keys=False)


SPARSEGPT = """\
test_stage:
  obcq_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: 2:4
      dampening_frac: 0.001
      block_size: 64
      targets: ['Linear']
      ignore: ['re:.*lm_head']
"""
SAVED = """\
DEFAULT_stage:
  DEFAULT_modifiers:
    SparseGPTModifier: {block_size: 128, compressible_layers_: null, dampening_frac: 0.01, end: null, ended_: false,
      group: null, index: null, initialized_: false, mask_structure: 0:0, owl_lmbda: null, owl_m: null, prunem_: null,
      quantize: false, sequential_update: true, sparsity: 0.95, sparsity_profile: null, start: null, targets: null}
"""


def test_sparsegpt_as_its_page_shows_it(tmp_path: Path):
    assert translated(tmp_path, SPARSEGPT) == {
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
        "method": "sparsegpt",
        "pattern": "2:4",
        "sparsity": 0.5,
        "method_args": {"block": 64, "damping": 0.001},
        **SEQUENTIAL,
    }


def test_a_recipe_that_was_saved_with_all_of_its_fields(tmp_path: Path):
    found = translated(tmp_path, SAVED)
    assert found == {
        "targets": ["Linear"],
        "method": "sparsegpt",
        "pattern": "unstructured",
        "sparsity": 0.95,
        "method_args": {"block": 128, "damping": 0.01},
        **SEQUENTIAL,
    }


def test_wanda_has_its_quota_and_owl_its_constants(tmp_path: Path):
    given: dict[str, Any] = {"sparsity": 0.6, "targets": "__ALL__"}
    assert translated(tmp_path, stage(WandaPruningModifier=given)) == {
        "targets": ["Linear"], "method": "wanda", "pattern": "unstructured", "sparsity": 0.6, "quota": "row",
        **SEQUENTIAL,
    }  # fmt: skip
    owl = {"sparsity": 0.6, "sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.08}
    assert translated(tmp_path, stage(SparseGPTModifier=owl))["allocation"] == "owl"


def test_their_mask_says_what_is_pruned_and_magnitude_its_last_sparsity(tmp_path: Path):
    given = {"init_sparsity": 0.25, "final_sparsity": 0.25, "mask_structure": "1:4", "targets": ["re:.*mlp.*"]}
    found = translated(tmp_path, stage(MagnitudePruningModifier=given))
    assert (found["method"], found["pattern"], found["sparsity"]) == ("magnitude", "3:4", 0.25)


@pytest.mark.parametrize(
    ("target", "ours"),
    [
        (r"re:model.layers.\d*$", r"re:model.layers.\d*(\..*)?$"),
        ("model.layers.1", r"re:model\.layers\.1(\..*)?$"),
        ("LlamaDecoderLayer", "Linear"),
        ("re:.*q_proj", "re:.*q_proj"),
    ],
)
def test_a_module_stands_for_all_that_is_inside_of_it(build, tmp_path: Path, target: str, ours: str):
    found = translated(tmp_path, stage(MagnitudePruningModifier={"final_sparsity": 0.5, "targets": [target]}))
    assert found["targets"] == [ours]
    if target.startswith("model"):
        report = convexprune.prune(build("llama"), **SMALL | found).report
        assert len(report.operators) == 7 and all(".1." in o.name for o in report.operators)


def test_several_modifiers_are_rules(build, tmp_path: Path):
    text = stage(
        SparseGPTModifier={"sparsity": 0.5, "targets": ["re:.*mlp.*"]},
        WandaPruningModifier={"sparsity": 0.25, "targets": ["re:.*self_attn.*"]},
    )
    found = translated(tmp_path, text)
    rule = {"targets": ["re:.*self_attn.*"], "method": "wanda", "pattern": "unstructured 25% per row"}
    assert found["targets"] == ["re:.*mlp.*", "re:.*self_attn.*"] and found["rules"] == [rule]
    report = convexprune.prune(build("llama"), **SMALL | found).report
    assert {o.sparsity for o in report.operators if "self_attn" in o.name} == {0.25}
    assert {o.sparsity for o in report.operators if "mlp" in o.name} == {0.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (stage(GPTQModifier={"scheme": "W4A16"}), "GPTQModifier cannot be translated"),
        (stage(ConstantPruningModifier={"targets": ["re:.*"]}), "ConstantPruningModifier cannot be translated"),
        (stage(SparseGPTModifier={"sparsity": [0.5, 0.6]}), "a sparsity for each layer cannot be translated"),
        (stage(SparseGPTModifier={"sparsity": 0.5, "mask_structure": "2:4", "preserve_sparsity_mask": True}),
         "SparseGPTModifier: preserve_sparsity_mask cannot be translated"),
        (stage(SparseGPTModifier={"sparsity": 0.5, "sparsty_profile": "owl"}), "sparsty_profile cannot be translated"),
        (stage(SparseGPTModifier={"sparsity": 0.5, "sparsity_profile": "owl", "owl_m": 7, "owl_lmbda": 0.08}),
         "owl_m 7 and owl_lmbda 0.08 cannot be translated. Ours is owl with 5 and 0.08"),
        (stage(SparseGPTModifier={"mask_structure": "0:0"}), "says no sparsity"),
        (stage(SparseGPTModifier={"sparsity": 0.5, "mask_structure": "block"}), "'block' is not N:M"),
        (stage(MagnitudePruningModifier={"init_sparsity": 0.0, "final_sparsity": 0.5}), "pruning while training"),
        (stage(SparseGPTModifier={"sparsity": 0.5}, WandaPruningModifier={"sparsity": 0.5}), "has pruned before it"),
        (stage(SparseGPTModifier={"sparsity": 0.5, "ignore": ["a"]},
               WandaPruningModifier={"sparsity": 0.5, "targets": ["b"]}), "a rule cannot. Write both lists alike"),
        (stage(WandaPruningModifier={"sparsity": 0.5},
               SparseGPTModifier={"sparsity": 0.5, "targets": ["b"], "dampening_frac": 0.1}),
         "SparseGPTModifier: method_args"),
        (stage(WandaPruningModifier={"sparsity": 0.5, "sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.08},
               MagnitudePruningModifier={"final_sparsity": 0.5, "targets": ["b"]}),
         "WandaPruningModifier: allocation is of all"),
        ("train_stage: {run_type: train}", "train_stage.run_type is 'train'"),
        ("args: {sparsity: 0.5}", "args cannot be translated"),
        ("quant_stage: {quant: 3}", "quant_stage.quant cannot be translated"),
        ("a_stage: {}", "no pruning modifier"),
        ("- 3", "it is no list of settings"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_named(tmp_path: Path, text: str, words: str):
    with pytest.raises(errors.RecipeError) as refused:
        translated(tmp_path, text)
    assert words in str(refused.value)


def test_a_mask_that_contradicts_the_sparsity_is_refused(tmp_path: Path):
    with pytest.raises(errors.PatternError, match=r"but 0\.33 was asked"):
        translated(tmp_path, stage(SparseGPTModifier={"sparsity": 0.33, "mask_structure": "2:4"}))


def test_the_command_writes_a_recipe_that_prune_reads(tmp_path: Path):
    (tmp_path / "theirs.yaml").write_text(SPARSEGPT)
    given = ("recipe", "from-llmcompressor", tmp_path / "theirs.yaml")
    printed = run(*given)
    assert printed.exit_code == 0 and "pattern: '2:4'" in printed.stdout
    assert run(*given, "-o", tmp_path / "ours.yaml").exit_code == 0
    assert read_recipe(tmp_path / "ours.yaml").pattern == "2:4"
    assert "is there already" in str(run(*given, "-o", tmp_path / "ours.yaml").exception)
