from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaModel, PretrainedConfig, PreTrainedModel

import convexprune
from convexprune.adapters import HuggingFaceModel, load
from convexprune.adapters.experts import Pile, Slice, SliceInput
from convexprune.adapters.operators import ParameterOperator, Place
from convexprune.errors import ModelError, RecipeError

BATCH = torch.arange(3, 45).reshape(2, 21) * 31 % 4096


def operators(model):
    return [f"{layer.name}.{operator.name}" for layer in model.layers for operator in layer.operators]


def stages(layer):
    return tuple(tuple(operator.name for operator in group.operators) for (group,) in layer.stages)


def linears(model):
    return [name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]


def own_layer_outputs(model, batch):
    outputs = []
    hooks = [layer.module.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in model.layers]
    with torch.no_grad():
        model.model(batch)
    for hook in hooks:
        hook.remove()
    return [output if isinstance(output, torch.Tensor) else output[0] for output in outputs]


# ---- capture and replay


@torch.no_grad()
def test_layers_replayed_one_by_one_give_the_models_own_outputs_bit_for_bit(tiny):
    hidden = tiny.first_inputs(BATCH)
    expected = own_layer_outputs(tiny, BATCH)
    calls = tiny.calls(BATCH)
    assert len(calls) == len(tiny.layers) == 2
    for layer, call, output in zip(tiny.layers, calls, expected, strict=True):
        hidden = call(layer.module, hidden)
        assert torch.equal(hidden, output)


@torch.no_grad()
def test_a_recorded_call_serves_other_batches_of_the_same_shape(tiny):
    calls = tiny.calls(BATCH)
    hidden = tiny.first_inputs(BATCH.flip(0, 1))
    for layer, call in zip(tiny.layers, calls, strict=True):
        hidden = call(layer.module, hidden)
    assert torch.equal(hidden, own_layer_outputs(tiny, BATCH.flip(0, 1))[-1])


@torch.no_grad()
def test_replaying_twice_gives_the_same(tiny_llama):
    (call, _), hidden = tiny_llama.calls(BATCH), tiny_llama.first_inputs(BATCH)
    module = tiny_llama.layers[0].module
    assert torch.equal(call(module, hidden), call(module, hidden))


def test_first_inputs_are_what_the_first_layer_sees_and_need_no_gradient(tiny):
    with torch.no_grad():
        expected = tiny.model(BATCH, output_hidden_states=True).hidden_states[0]
    inputs = tiny.first_inputs(BATCH)
    assert torch.equal(inputs, expected)
    assert not inputs.requires_grad


def test_first_inputs_run_no_decoder_layer(tiny_opt, monkeypatch):
    def refuse(*_: Any, **__: Any):
        raise AssertionError("a decoder layer ran")

    monkeypatch.setattr(tiny_opt.layers[0].module, "forward", refuse)
    assert tiny_opt.first_inputs(BATCH).shape == (2, 21, 32)


@torch.no_grad()
def test_hidden_states_may_come_by_name(tiny_llama, monkeypatch):
    inner = tiny_llama.model.base_model
    expected, inputs = own_layer_outputs(tiny_llama, BATCH), tiny_llama.first_inputs(BATCH)

    def forward(input_ids, **_: Any):
        hidden = inner.embed_tokens(input_ids)
        rotary = inner.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in inner.layers:
            hidden = layer(hidden_states=hidden, position_embeddings=rotary)

    monkeypatch.setattr(inner, "forward", forward)
    hidden = tiny_llama.first_inputs(BATCH)
    assert torch.equal(hidden, inputs)
    for layer, call in zip(tiny_llama.layers, tiny_llama.calls(BATCH), strict=True):
        hidden = call(layer.module, hidden)
    assert torch.equal(hidden, expected[-1])


def test_no_hook_is_left_behind_even_after_a_failure(tiny_opt):
    tiny_opt.calls(BATCH)
    tiny_opt.first_inputs(BATCH)
    for record in (tiny_opt.calls, tiny_opt.first_inputs):
        with pytest.raises(IndexError):
            record(BATCH + 10_000)
    assert not any(module._forward_pre_hooks for module in tiny_opt.model.modules())


# ---- which operators


def test_every_linear_is_either_in_one_stage_or_left_alone(tiny):
    alone = [name for name, _ in tiny.left_alone]
    assert sorted(operators(tiny) + alone) == sorted(linears(tiny))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt", "tied to model.decoder.embed_tokens.weight"),
        ("llama-tied", "tied to model.embed_tokens.weight"),
        ("llama", "not inside a decoder layer"),
    ],
)
def test_the_head_is_left_alone_for_the_right_reason(build, name, reason):
    assert HuggingFaceModel(build(name)).left_alone == [("lm_head", reason)]


def test_an_operator_whose_memory_another_layer_uses_is_left_alone(build):
    model = build("llama")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = nn.Parameter(first.weight.data[:, :])  # another parameter on the same memory
    left = dict(HuggingFaceModel(model).left_alone)
    assert left["model.layers.0.mlp.up_proj"] == "tied to model.layers.1.mlp.up_proj.weight"
    assert left["model.layers.1.mlp.up_proj"] == "tied to model.layers.0.mlp.up_proj.weight"


def test_separate_pieces_of_one_storage_are_not_tied(build):
    model = build("llama")
    attention = model.model.layers[0].self_attn
    together = torch.cat([attention.k_proj.weight.data, attention.v_proj.weight.data])
    attention.k_proj.weight, attention.v_proj.weight = (nn.Parameter(half) for half in together.chunk(2))
    assert [name for name, _ in HuggingFaceModel(model).left_alone] == ["lm_head"]


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
    ],
)
def test_targets_and_ignore_choose_operators(build, targets, ignore, expected):
    model = HuggingFaceModel(build("opt"), targets=targets, ignore=ignore)
    assert len(operators(model)) == expected
    assert len(operators(model)) + len(model.left_alone) == len(linears(model))


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


# ---- which models


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(build, refused, value):
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 3] = value
    with refused("NaN or infinity in a weight", r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 of 1,536"):
        HuggingFaceModel(model)


def test_weights_that_were_never_loaded_are_refused_whichever_way_they_come(build, refused):
    model = build("llama").to("meta")
    with pytest.raises(ModelError, match="meta device"):
        HuggingFaceModel(model)
    with refused("weights that were never loaded", "meta device"):
        load(model, device="cpu")


def test_quantised_models_are_refused_and_dequantised_ones_are_not(build, refused):
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    assert len(HuggingFaceModel(model).layers) == 2
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with refused("a quantised model (of any method but GGUF)", r"quantised \(bitsandbytes\)"):
        HuggingFaceModel(model)


def test_weights_that_are_no_floating_numbers_are_refused(build, refused):
    model = build("llama")
    codes = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(codes, requires_grad=False)
    with refused("weights that are integers", r"1\.self_attn\.q_proj\.weight.*of type torch\.int8"):
        HuggingFaceModel(model)


def test_a_model_without_its_head_can_be_pruned(build):
    assert HuggingFaceModel(LlamaModel(build("llama").config)).layers[1].name == "layers.1"


# ---- architectures that nobody has described


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


WIDTH = 8


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


def test_an_architecture_that_nobody_described_is_pruned(odd):
    tokens = torch.randint(0, 64, (4, 12))
    report = convexprune.prune(odd, dataset=tokens, num_calibration_samples=4, pattern="2:4").report
    assert len(report.operators) == 10
    assert all(o.zeros == o.expected_zeros == WIDTH * WIDTH // 2 for o in report.operators)


def test_layers_whose_arguments_depend_on_the_tokens_are_refused(odd, refused):
    odd.between = lambda ids, scale: scale * (1 + ids[0, 0])
    with refused("layers that are not the model when called one by one", "do not give what the model gives"):
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


def test_a_copy_of_a_model_is_tapped_and_pruned_by_itself(tiny):
    import copy

    twin = copy.deepcopy(tiny)
    for own, other in zip(tiny.layers[0].operators, twin.layers[0].operators, strict=True):
        before = own.read().clone()
        other.write(other.read() * 0)
        assert torch.equal(own.read(), before) and not other.read().any()
    seen = []
    with twin.layers[0].groups[0].tap(seen.append), torch.no_grad():
        tiny.model(BATCH)
        assert not seen
        twin.model(BATCH)
    assert len(seen) == 1


# ---- piles of matrices


class Bank(nn.Module):
    """Three matrices W [4 6] in one parameter, and three W' [6 4] in another."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(3, 4, 6))
        self.turned = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return [x @ self.turned[i] + nn.functional.linear(x, self.plain[i]) for i in (2, 0)]


@torch.no_grad()
def test_each_product_with_a_slice_of_a_pile_is_heard_with_its_inputs():
    bank, x, heard = Bank(), torch.randn(5, 6), []
    with Pile(bank).listen(lambda product: heard.append(product)):
        bank(x)
    bank(x)
    assert [(h.slice.parameter, h.slice.index, h.transposed) for h in heard] == [
        (name, i, name == "turned") for i in (2, 0) for name in ("turned", "plain")
    ]
    assert all(torch.equal(h.inputs, x) for h in heard)


@torch.no_grad()
def test_taps_of_a_pile_hear_their_own_slice_and_leave_nothing_behind_when_a_pass_is_ended():
    bank, x, heard = Bank(), torch.randn(5, 6), []

    def tell(inputs):
        heard.append(inputs)
        raise ValueError("enough")

    pile = Pile(bank)
    first, second = (SliceInput(pile, Slice("plain", i)) for i in (0, 1))
    with pytest.raises(ValueError, match="enough"), first(tell), second(tell):
        bank(x)
    bank(x)
    assert len(heard) == 1 and not pile.listeners
    assert bank.training and not bank._forward_hooks and not bank._forward_pre_hooks


@pytest.mark.parametrize("place", [Place("", "plain", 1), Place("", "turned", 1, transposed=True)])
def test_a_slice_is_written_and_its_neighbours_are_not(place):
    bank, weight = Bank(), torch.randn(4, 6)
    before = bank.get_parameter(place.parameter).detach().clone()
    operator = ParameterOperator(bank, place)
    operator.write(weight)
    assert operator.shape == (4, 6) and torch.equal(operator.read(), weight)
    assert torch.equal(bank.get_parameter(place.parameter)[::2], before[::2])
