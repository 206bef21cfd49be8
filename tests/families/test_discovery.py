"""An architecture that nobody described is found by watching it and pruned, or refused where that cannot be right."""

from math import nan
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import convexprune
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._discovery import probing
from convexprune.errors import ModelError

WIDTH = 8


class Odd(nn.Module):
    """A decoder layer with a map that is called twice, one never, one by name, and two steps that look like experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.into, self.beside, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.twice, self.idle, self.named = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.steps = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.table = nn.Parameter(torch.randn(WIDTH, 3))

    def forward(self, states, *, scale):
        x = self.norm(states)
        mixed = self.into(x).cumsum(1) / scale
        mixed = self.out(mixed.tanh()) * self.beside(x).sigmoid()
        mixed = self.twice(self.twice(mixed)) + self.named(input=mixed) + (mixed @ self.table).sum(-1, keepdim=True)
        for step in self.steps:
            mixed = step(mixed)
        return (states + mixed, None)


class OddConfig(PretrainedConfig):
    model_type = "odd"
    num_hidden_layers = 2
    initializer_range = 0.5


class OddModel(PreTrainedModel):
    """A model of which transformers knows nothing."""

    config_class = OddConfig
    between: Any = None

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Odd() for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids, use_cache=None):
        hidden = self.words(input_ids)
        scale = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        for block in self.blocks:
            hidden = block(hidden, scale=scale if self.between is None else self.between(input_ids, scale))[0]
        return hidden


@pytest.fixture
def odd() -> OddModel:
    torch.manual_seed(0)
    return OddModel(OddConfig())


def test_an_architecture_that_nobody_described_is_found_by_watching_it(odd):
    model = HuggingFaceModel(odd)
    names = [[[o.name for o in group.operators] for group in stage] for stage in model.layers[1].stages]
    assert names == [[["into", "beside"]], [["out"]], [["steps.0.0"]], [["steps.1.0"]]]
    assert {name: reason for name, reason in model.left_alone if name.startswith("blocks.0")} == {
        "blocks.0.twice": "called 2 times in one pass of its layer",
        "blocks.0.idle": "not called in a forward pass",
        "blocks.0.named": "not called in a forward pass",
        "blocks.0.table": "in a Odd, no known linear map",
    }


class Plain(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T


class Normed(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, nn.functional.normalize(self.weight))


def test_what_is_derived_from_a_linear_module_and_computes_something_else_is_left_alone(odd):
    for block in odd.blocks:
        block.into, block.out = (kind(WIDTH, WIDTH, bias=False) for kind in (Plain, Normed))
    model = HuggingFaceModel(odd)
    assert [o.name for o in model.layers[0].operators] == ["into", "beside", "steps.0.0", "steps.1.0"]
    assert dict(model.left_alone)["blocks.0.out"] == "in a Normed, no known linear map"


def test_an_architecture_that_nobody_described_is_pruned(odd):
    tokens = torch.randint(0, 64, (4, 12))
    report = convexprune.prune(odd, dataset=tokens, num_calibration_samples=4, pattern="2:4").report
    assert len(report.operators) == 10
    assert all(o.zeros == o.expected_zeros == WIDTH * WIDTH // 2 for o in report.operators)


def test_layers_whose_arguments_depend_on_the_tokens_are_refused(odd, refused):
    odd.between = lambda ids, scale: scale * (1 + ids[0, 0])
    with refused("layers that are not the model when called one by one", "do not give what the model gives"):
        HuggingFaceModel(odd)


def test_values_that_are_not_finite_are_told_from_other_layers(odd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probing, "replay_error", lambda *_: nan)
    with pytest.raises(ModelError, match=r"NaN or infinite in torch.float32. Take another dtype"):
        HuggingFaceModel(odd)


@pytest.mark.parametrize(("blocks", "called"), [([0, 1, 1], 3), ([0], 1)])
def test_layers_that_are_called_again_or_not_at_all_are_refused(odd, refused, blocks: list[int], called: int):
    def forward(input_ids, use_cache=None):
        hidden = odd.words(input_ids)
        for number in blocks:
            (hidden, _) = odd.blocks[number](hidden, scale=torch.arange(1, input_ids.shape[1] + 1)[:, None])
        return hidden

    odd.forward = forward
    with refused("layers that are not called once each", f"calls {called} decoder layers, and there are 2. Each has"):
        HuggingFaceModel(odd)


def test_hidden_states_of_another_shape_are_refused(odd, refused):
    odd.words.register_forward_hook(lambda *call: torch.stack([call[2]] * 3))  # several streams, as Gemma 3n has
    with refused("hidden states that are not [batch tokens hidden]", r"states \[3, 1, 16, 8\] for \[1, 16\] tokens"):
        HuggingFaceModel(odd)


def test_a_model_whose_layers_are_not_to_be_found_is_refused(odd, refused):
    odd.config.num_hidden_layers = 3
    odd.tower = nn.ModuleList(Odd() for _ in range(4))
    with refused(
        "a model in which the decoder layers are not plain to see",
        r"blocks \(2 modules\), tower \(4 modules\). One of 3",
    ):
        HuggingFaceModel(odd)
