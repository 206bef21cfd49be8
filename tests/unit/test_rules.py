"""Rules of a recipe: some operators have another sparsity, pattern or method, with exact counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from crash import forks
from door import SMALL, TOKENS
from test_cli import folder, run

import convexprune
from convexprune import errors
from convexprune._layerwise.processes import ProcessGroup
from convexprune._layerwise.work import Work
from convexprune._recipe_file import read_recipe
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._discovery.selection import with_rules
from convexprune.recipe import make_recipe
from convexprune.report import OperatorReport, Report

__all__ = ["folder"]  # a fixture of test_cli

RULES: list[dict[str, Any]] = [
    {"targets": ["re:.*layers\\.0\\.mlp\\.down_proj"], "sparsity": 0},
    {"targets": ["down_proj", "o_proj"], "sparsity": 0.25},
    {"targets": "k_proj", "pattern": "2:4", "method": "wanda"},
    {"targets": ["v_proj"], "method": "magnitude", "sparsity": 0.75},
]


def by_name(report: Report) -> dict[str, OperatorReport]:
    return {o.name.removeprefix("model."): o for o in report.operators}


def test_each_operator_has_what_the_first_rule_that_matches_says(build):
    result = convexprune.prune(build("llama"), **SMALL, sparsity=0.5, rules=RULES)
    found = by_name(result.report)
    for name, o in found.items():
        own = {"down_proj": 0.25, "o_proj": 0.25, "v_proj": 0.75}.get(name.rpartition(".")[2], 0.5)
        expected = 0 if name == "layers.0.mlp.down_proj" else own
        assert o.zeros == o.expected_zeros == expected * o.outputs * o.inputs
        weight = result.model.get_submodule(f"model.{name}").weight
        assert isinstance(weight, torch.Tensor) and int((weight == 0).sum()) == o.zeros
    assert found["layers.1.self_attn.k_proj"].pattern == "2:4"
    assert found["layers.1.self_attn.k_proj"].gap is None and found["layers.1.self_attn.q_proj"].gap is not None
    rules = {name.rpartition(".")[2]: o.facts.get("rule") for name, o in found.items()}
    assert rules == {"q_proj": None, "k_proj": 3, "v_proj": 4, "o_proj": 2, "gate_proj": None, "up_proj": None} | {
        "down_proj": 2
    }
    assert found["layers.0.mlp.down_proj"].facts["rule"] == 1
    assert result.report.recipe["rules"][1]["sparsity"] == 0.25


def test_a_method_of_a_rule_gives_the_weights_that_it_gives_alone(build):
    """k and v share their input with q, which another method prunes."""
    given = SMALL | {"allocation": "uniform", "error_correction": 0}
    rules = [{"targets": ["k_proj", "v_proj"], "method": "wanda"}]
    mixed = convexprune.prune(build("llama"), **given, method="sparsegpt", rules=rules).model
    alone = {name: convexprune.prune(build("llama"), **given, method=name).model for name in ("wanda", "sparsegpt")}
    for name, method in {"q": "sparsegpt", "k": "wanda", "v": "wanda"}.items():
        place = f"model.layers.0.self_attn.{name}_proj.weight"
        assert torch.equal(mixed.get_parameter(place), alone[method].get_parameter(place))


def test_a_rule_is_one_pruner_on_every_rank(build):
    """Or ranks would solve other stacks than one process does."""
    loaded = HuggingFaceModel(build("llama"))
    recipe = make_recipe(rules=[{"targets": ["k_proj", "v_proj"], "method": "wanda"}], allocation="uniform")
    settings = with_rules(recipe.layer_settings(), recipe, loaded.layers)
    for each in (settings, Work(TOKENS, TOKENS[:0], 1, settings).of_rank(ProcessGroup(1, 2)).settings):
        assert len(each.pruners) == 4 and len({id(pruner) for pruner in each.pruners.values()}) == 1


def test_a_rule_that_is_a_word_says_how_rules_are_written():
    with pytest.raises(errors.RecipeError, match=r"rules\.0='nonsense' names no settings\. Write \{targets: "):
        make_recipe(rules=["nonsense"])


def test_a_pool_prunes_by_rules_to_the_same_bits(folder: Path):
    given: dict[str, Any] = {"dataset": folder / "text.txt", "nsamples": 4, "seqlen": 32, "bound_rows": 0, "threads": 1}
    given |= {"rules": [{"targets": ["k_proj", "v_proj"], "method": "wanda"}, {"targets": ["fc1"], "sparsity": 0.25}]}
    one = convexprune.prune(folder / "model", **given, output_dir=folder / "one")
    with forks():
        two = convexprune.prune(folder / "model", **given, output_dir=folder / "two", executor="pool", workers=2)
    assert one.report.files["model.safetensors"] == two.report.files["model.safetensors"]


def test_rules_that_change_nothing_change_no_bit(build):
    rules = [{"targets": ["re:.*self_attn.*"], "sparsity": 0.5}]
    one, two = (convexprune.prune(build("llama"), **SMALL, rules=each).model for each in ([], rules))
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ([{"targets": ["up_prj"], "sparsity": 0.3}], errors.ModelError,
         "Unknown operator 'up_prj'. Did you mean 'up_proj'?"),
        ([{"targets": ["lm_head"], "sparsity": 0.3}], errors.ModelError, "about no operator that is pruned"),
        ([{"targets": ["re:.*_proj", "re:(x"], "sparsity": 0.3}], errors.RecipeError, "is not a regular expression"),
        ([{"targets": ["Linear"], "sparsity": 0.3}, {"targets": ["o_proj"], "sparsity": 0.2}], errors.RecipeError,
         r"Rule 2 (o_proj) is never used: rule 1 comes first and matches all of its operators."),
        ([{"targets": ["o_proj"], "sparsty": 0.3}], errors.RecipeError, "setting of rules.0 'sparsty'. Did you mean"),
        ([{"targets": ["o_proj"]}], errors.RecipeError, "The rule for o_proj changes nothing"),
        ([{"sparsity": 0.3}], errors.RecipeError, "rules.0.targets"),
        ([{"targets": [], "sparsity": 0.3}], errors.RecipeError, "rules.0.targets=[]"),
        ([{"targets": ["o_proj"], "sparsity": 1.5}], errors.PatternError, "1.5"),
        ([{"targets": ["o_proj"], "pattern": "2:4", "sparsity": 0.3}], errors.PatternError, "but 0.3 was asked"),
        ([{"targets": ["o_proj"], "pattern": "3:5"}], errors.PatternError, "o_proj"),
        ([{"targets": ["o_proj"], "method": "wando"}], errors.RecipeError, "Did you mean 'wanda'?"),
        ([{"targets": ["o_proj"], "pattern": "int8"}], errors.PatternError, "quantize='int4' puts what is kept on"),
        ({"targets": ["o_proj"], "sparsity": 0.3}, errors.RecipeError, "is no list. Write"),
        (["o_proj"], errors.RecipeError, "rules.0='o_proj'"),
        ([{"targets": ["o_proj"], "pattern": "channels"}], errors.RecipeError, "no rule is about parts"),
    ],
)  # fmt: skip
def test_bad_rules_are_refused_before_any_work(build, rules: Any, error: type[Exception], words: str):
    loaded = build("llama")
    before = [p.detach().clone() for p in loaded.parameters()]
    with pytest.raises(error) as refused:
        convexprune.prune(loaded, **SMALL, rules=rules)
    assert words in str(refused.value)
    assert all(map(torch.equal, before, loaded.parameters()))


def test_an_allocation_over_all_operators_is_refused(build):
    rules = [{"targets": ["o_proj"], "sparsity": 0.3}]
    with pytest.raises(errors.RecipeError, match="Rule 1 says what its operators get, and allocation='half-curve'"):
        convexprune.prune(build("llama"), **SMALL, rules=rules, allocation="half-curve")
    rules = [{"targets": ["o_proj"], "method": "wanda"}]
    assert convexprune.Recipe(allocation="half-curve", rules=rules).rules[0].method == "wanda"  # pyright: ignore


def test_rules_belong_to_a_run_and_its_recipe(build, tmp_path: Path):
    given: dict[str, Any] = SMALL | {"method": "magnitude", "output_dir": tmp_path / "out"}
    convexprune.prune(build("llama"), **given, rules=RULES[:2])
    recipe = read_recipe(tmp_path / "out")
    assert [rule.sparsity for rule in recipe.rules] == [0, 0.25]
    with pytest.raises(errors.OutputError, match=r"it differs in recipe\.rules"):
        convexprune.prune(build("llama"), **given, rules=RULES[1:2], resume=True)
    again = convexprune.prune(build("llama"), recipe=recipe, dataset=TOKENS)
    assert by_name(again.report)["layers.1.self_attn.o_proj"].sparsity == 0.25


@pytest.mark.long
def test_a_folder_with_rules_can_be_verified_and_inspected(folder: Path):
    (folder / "recipe.yaml").write_text("method: magnitude\nrules:\n- {targets: [fc1], sparsity: 0.25}\n")
    options = ["--dataset", folder / "text.txt", "--nsamples", 4, "--seqlen", 32, "--output", folder / "out"]
    rule = ("--rule", "{targets: [fc2, 're:.*out_proj'], pattern: '2:4'}")
    given = ("prune", folder / "model", "--recipe", folder / "recipe.yaml", *options)
    planned = run(*given, "--dry-run")
    assert "Rule 1 (fc1): sparsity 0.25, for 2 operators." in planned.output, planned.output
    done = run(*given, *rule)  # in place of those of the recipe
    assert done.exit_code == 0, done.output
    report = convexprune.prune(folder / "model", recipe=folder / "out", output_dir=folder / "out", resume=True).report
    assert {o.pattern for o in report.operators if o.name.endswith(("fc2", "out_proj"))} == {"2:4"}
    assert {o.facts.get("rule") for o in report.operators if o.name.endswith("fc1")} == {None}
    verified = run("verify", folder / "out", "--operators", "re:.*fc2", "--rows", 1, "--columns", 4)
    assert verified.exit_code == 0 and "passed" in verified.output, verified.output
    inspected = run("inspect", folder / "model", "--rule", "{targets: [fc1], sparsity: 0}")
    assert "Rule 1 (fc1): sparsity 0.0, for 2 operators." in inspected.output
