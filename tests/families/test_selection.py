"""Which operators of a model `targets` and `ignore` choose: each linear map is in one stage or left alone."""

import pytest
from tiny_families import FAMILIES
from torch import nn

from convexprune.adapters import HuggingFaceModel
from convexprune.errors import ModelError, RecipeError


def operators(model):
    return [f"{layer.name}.{operator.name}" for layer in model.layers for operator in layer.operators]


def stages(layer):
    return tuple(tuple(operator.name for operator in group.operators) for (group,) in layer.stages)


def linears(model):
    return [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]


def test_every_linear_is_either_in_one_stage_or_left_alone(tiny):
    alone = [name for name, _ in tiny.left_alone]
    assert sorted(operators(tiny) + alone) == sorted(linears(tiny))


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["Linear"], [], 12),
        (["fc1"], [], 2),
        (["self_attn.q_proj", "fc2"], [], 4),
        (["model.decoder.layers.1.fc1"], [], 1),
        (["re:.*_proj$"], [], 8),
        (["re:self_attn"], ["re:.*k_proj"], 6),
        (["Linear"], ["fc1", "fc2"], 8),
        (["Linear"], ["re:model.decoder.layers.0"], 6),
        (["Linear"], ["lm_head"], 12),
        (["layers.1.self_attn.q_proj", "1.fc1", "decoder.layers.0.fc1"], [], 3),
    ],
)
def test_targets_and_ignore_choose_operators(build, targets, ignore, expected):
    model = HuggingFaceModel(build("opt"), targets=targets, ignore=ignore)
    assert len(operators(model)) == expected
    assert len(operators(model)) + len(model.left_alone) == len(linears(model))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("experts.down_proj", 8),
        ("experts.down_proj.1", 2),
        ("layers.1.mlp.experts.down_proj.1", 1),
        ("down_proj", 8),
    ],
)
def test_last_parts_choose_experts(target, expected):
    assert len(operators(HuggingFaceModel(FAMILIES["gpt_oss"](), targets=[target]))) == expected


def test_layers_without_operators_stay_and_empty_stages_go(build):
    model = HuggingFaceModel(build("opt"), targets=["model.decoder.layers.1.fc1"])
    assert [stages(layer) for layer in model.layers] == [(), (("fc1",),)]


def test_the_recipes_reasons_are_kept(build):
    model = HuggingFaceModel(build("opt"), targets=["fc1", "fc2"], ignore=["model.decoder.layers.0.fc2"])
    left = dict(model.left_alone)
    assert left["model.decoder.layers.0.fc2"] == "ignored by the recipe"
    assert left["model.decoder.layers.0.self_attn.q_proj"] == "not among the targets of the recipe"


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"targets": ["q_porj"]}, ModelError, "Unknown operator 'q_porj'. Did you mean 'q_proj'"),
        ({"targets": ["attn.q_proj"]}, ModelError, "Unknown operator 'attn.q_proj'"),
        ({"targets": ["model.layers.1."]}, ModelError, "Unknown operator"),
        ({"ignore": ["lm_haed"]}, ModelError, "Did you mean 'lm_head'"),
        ({"ignore": ["Linear"]}, ModelError, "leave no operator to prune.*fc1"),
        ({"targets": ["lm_head"]}, ModelError, "leave no operator to prune.*tied to"),
        ({"targets": []}, ModelError, "leave no operator to prune"),
        ({"targets": ["re:("]}, RecipeError, r"'re:\(' is not a regular expression"),
        ({"targets": "fc1"}, RecipeError, r"Write \['fc1'\]"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(build, choice, error, message):
    with pytest.raises(error, match=message):
        HuggingFaceModel(build("opt"), **choice)
