"""benchmarks/gauge.py: the same function, and none of the stored weights."""

import runpy
from pathlib import Path

import torch
from tiny_families import GROUPED, TOKENS
from transformers import LlamaConfig, LlamaForCausalLM

regauge = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "gauge.py"))["regauge"]


@torch.no_grad()
def test_another_gauge_has_other_weights_and_the_same_logits():
    model = LlamaForCausalLM(LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)).double().eval()
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    before, weights = model(TOKENS).logits, {name: p.clone() for name, p in model.named_parameters()}
    regauge(model)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-4)  # norms compute in float32
    for number, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            if name.endswith("weight"):
                stored = weights[f"model.layers.{number}.{name}"]
                assert bool((parameter / stored - 1).abs().flatten().quantile(0.1) > 1e-3)
