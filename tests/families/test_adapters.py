"""Decoder layers, recorded and replayed one by one, are the model; no hook stays, and a copy is watched by itself."""

from typing import Any

import pytest
import torch

from convexprune.adapters._discovery.passes import logits_at

BATCH = torch.arange(3, 45).reshape(2, 21) * 31 % 4096


@torch.no_grad()
def own_layer_outputs(model, batch):
    outputs = []
    hooks = [layer.module.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in model.layers]
    logits_at(model.model, batch)
    for hook in hooks:
        hook.remove()
    return [output if isinstance(output, torch.Tensor) else output[0] for output in outputs]


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
        return (hidden,)

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


def test_a_copy_of_a_model_is_tapped_and_pruned_by_itself(tiny):
    import copy

    twin = copy.deepcopy(tiny)
    for own, other in zip(tiny.layers[0].operators, twin.layers[0].operators, strict=True):
        before = own.read().clone()
        other.write(other.read() * 0)
        assert torch.equal(own.read(), before) and not other.read().any()
    seen = []
    with twin.layers[0].groups[0].input_hook(seen.append), torch.no_grad():
        tiny.model(BATCH)
        assert not seen
        twin.model(BATCH)
    assert len(seen) == 1
