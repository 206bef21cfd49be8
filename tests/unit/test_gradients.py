"""What moves the loss, against differences of it: the model is run with one number of one token pushed up and down."""

from collections.abc import Callable
from itertools import product as every
from typing import Any

import pytest
import torch
from tiny_families import VOCABULARY, build_family
from tiny_models import TINY
from torch import Tensor

from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._discovery.experts import FusedExperts, Product, fused_parameters
from convexprune.adapters._discovery.operators import Place
from convexprune.adapters._gradients import loss_fisher

TOKENS = torch.randint(2, 4000, (1, 24), generator=torch.Generator().manual_seed(0))
STEP = 1e-2


@torch.no_grad()
def loss_of(model: Any, tokens: Tensor) -> float:
    logits = model(tokens).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()


def squared_slopes(loss: Callable[[int, float], float], tokens: int) -> float:
    """The sum over tokens of the squared derivative of the `loss` by how far a token is pushed."""
    return sum(((loss(token, STEP) - loss(token, -STEP)) / (2 * STEP)) ** 2 for token in range(tokens))


@pytest.mark.parametrize("name", [name for name in TINY if "bf16" not in name])  # differences need float32
def test_the_fisher_estimate_is_the_squared_gradient_of_the_loss(build, name: str):
    tiny, row = HuggingFaceModel(build(name)), 3
    name = f"{tiny.layers[-1].name}.{tiny.layers[-1].operators[-1].name}"
    found = loss_fisher(tiny, TOKENS).outputs[name][row].item()

    def loss(token: int, by: float) -> float:
        def push(_: Any, __: Any, output: Tensor) -> None:
            output.view(-1, output.shape[-1])[token, row] += by

        hook = tiny.model.get_submodule(name).register_forward_hook(push)
        try:
            return loss_of(tiny.model, TOKENS)
        finally:
            hook.remove()

    assert found == pytest.approx(squared_slopes(loss, 24) / 24, rel=2e-2)
    assert all(p.grad is None for p in tiny.model.parameters())


@pytest.mark.parametrize(("name", "block"), [("opt", 4), ("llama", 1), ("llama-tied", 2)])
def test_what_an_operator_reads_counts_by_the_derivative_of_the_loss_by_its_size(build, name: str, block: int):
    tiny, number = HuggingFaceModel(build(name)), 3
    operator = tiny.layers[0].operators[-1]
    name = f"{tiny.layers[0].name}.{operator.name}"
    found = loss_fisher(tiny, TOKENS, blocks=[(name, block)]).inputs

    def loss(token: int, by: float) -> float:
        def scale(_: Any, inputs: tuple[Tensor]) -> None:
            inputs[0].view(-1, inputs[0].shape[-1])[token, number * block : (number + 1) * block] *= 1 + by

        hook = tiny.model.get_submodule(name).register_forward_pre_hook(scale)
        try:
            return loss_of(tiny.model, TOKENS)
        finally:
            hook.remove()

    assert found.keys() == {(name, block)} and len(found[name, block]) == operator.shape[1] // block
    assert found[name, block][number].item() == pytest.approx(squared_slopes(loss, 24) / 24, rel=3e-2)


@pytest.mark.long
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "mixtral", "qwen3_moe"])
def test_the_fisher_estimate_of_an_expert_is_of_its_own_tokens(family: str, parameter: str):
    model, row = HuggingFaceModel(build_family(family)), 3
    ids = torch.randint(2, VOCABULARY - 2, (1, 12), generator=torch.Generator().manual_seed(0))
    layer = model.layers[-1]
    (path,) = [path for path, module in layer.module.named_modules() if fused_parameters(module)]
    pile = FusedExperts(layer.module.get_submodule(path))
    names = [f"{layer.name}.{Place(path, parameter, expert).name}" for expert in range(4)]
    fisher = loss_fisher(model, ids, blocks=[(name, 2) for name in names])
    weights = {f"{layer.name}.{operator.name}": operator.read() for operator in layer.operators}
    changed: list[tuple[int, float]] = []  # which of the expert's tokens, and by how much
    tokens: list[int] = []

    def hear(product: Product) -> Callable[[Tensor], Tensor]:
        tokens.append(len(product.inputs))
        columns = weights[names[product.expert[1]]][:, 2:4]

        def change(output: Tensor) -> Tensor:
            for token, by in changed:
                if reads:
                    output[token] += by * (columns @ product.inputs[token, 2:4])
                else:
                    output[token, row] += by
            return output

        return change

    def loss(token: int, by: float) -> float:
        changed[:] = [(token, by)]
        try:
            return loss_of(model.model, ids)
        finally:
            changed.clear()

    seen = 0
    for expert, reads in every(range(4), (False, True)):
        with pile.hooked(hear, (parameter, expert)):
            tokens.clear()
            loss_of(model.model, ids)
            own = sum(tokens)
            squares = squared_slopes(loss, own)
        found = fisher.inputs[names[expert], 2][1] if reads else fisher.outputs[names[expert]][row]
        assert found.item() == pytest.approx(squares / 12, rel=5e-2, abs=1e-9)
        seen += own
    assert seen == 2 * model.model.config.num_experts_per_tok * 12
