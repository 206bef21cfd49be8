"""Modules in memory whose weight is no plain parameter are refused before any work, and compiled ones are pruned."""

import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_families import SMALL
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import PreTrainedModel

import convexprune
from convexprune.adapters._checkpoints.origin import used_alone
from convexprune.errors import ModelError

Build = Callable[[str], PreTrainedModel]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def weight(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Linear], None]:
    def replace(module: nn.Linear) -> None:
        module.weight = nn.Parameter(change(module.weight.detach()), requires_grad=False)

    return replace


def without_a_parameter(module: nn.Linear) -> None:
    data = module.weight.detach()
    del module.weight
    module.register_buffer("weight", data)


def older_weight_norm(module: nn.Linear) -> None:
    with pytest.warns(FutureWarning):
        weight_norm(module)


class Subclass(Tensor):
    pass


UP = "model.layers.1.mlp.up_proj"
FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "parametrize": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()), "remove_parametrizations"),
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "mask": (lambda m: prune.l1_unstructured(m, "weight", 0.3), r"L1Unstructured.*prune\.remove\(module, 'weight'"),
    "older weight_norm": (older_weight_norm, "remove_weight_norm"),
    "older spectral_norm": (spectral_norm, "remove_spectral_norm"),
    "expanded": (weight(lambda w: w[:, :1].expand(w.shape)), "repeats its entries in memory"),
    "sparse": (weight(Tensor.to_sparse), "stored as torch.sparse_coo"),
    "float8": (weight(lambda w: w.to(torch.float8_e4m3fn)), "of type torch.float8_e4m3fn; accepted: torch.float16"),
    "complex": (weight(lambda w: w.to(torch.complex64)), "of type torch.complex64"),
    "subclass": (weight(lambda w: w.as_subclass(Subclass)), "is a Subclass, no plain"),
    "buffer": (without_a_parameter, "whose weight is no parameter"),
    "another dtype": (lambda m: m.to(torch.bfloat16), r"of several types: .*torch\.bfloat16.*bring them to one"),
}


OTHERS = [
    (fault, place) for fault in ("parametrize", "float8") for place in ("model.layers.0.input_layernorm", "lm_head")
]


@pytest.mark.filterwarnings("ignore:.*Sparse invariant checks")
@pytest.mark.parametrize(("fault", "place"), [*((fault, UP) for fault in FAULTS), *OTHERS])
def test_a_weight_that_is_no_plain_parameter_is_refused(build: Build, fault: str, place: str):
    spoil, message = FAULTS[fault]
    model = build("llama")
    spoil(model.get_submodule(place))
    with pytest.raises(ModelError, match=message) as refused:
        convexprune.prune(model, **SMALL)
    assert fault == "another dtype" or place in str(refused.value)


def test_a_compiled_layer_is_pruned_as_it_is_written_and_is_compiled_again(build: Build):
    model = build("llama")
    expected = deepcopy(model)
    model.model.layers[0].compile(backend="eager")
    compiled = model.model.layers[0]._compiled_call_impl
    for each in (model, expected):
        convexprune.prune(each, method="wanda", **SMALL)
    assert model.model.layers[0]._compiled_call_impl is compiled is not None
    pruned = dict(expected.named_parameters())
    assert all(torch.equal(p, pruned[name]) for name, p in model.named_parameters())


def test_two_threads_do_not_prune_one_model(build: Build):
    model, inside, end = build("llama"), threading.Event(), threading.Event()

    def use() -> None:
        with used_alone(model):
            inside.set()
            end.wait(20)

    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(20)
    with pytest.raises(ModelError, match="in use by another thread"):
        convexprune.prune(model, method="wanda", **SMALL)
    end.set()
    thread.join()
    convexprune.prune(model, method="wanda", **SMALL)
