"""Quantization by the door: what is kept is on its grid, and grids that there are not are refused."""

from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch
from door import SMALL, TOKENS, state
from runs import SETTINGS, stop_after

import convexprune
from convexprune._layerwise.allocation import allocate_by_rule, candidates
from convexprune._layerwise.steps.survey import survey
from convexprune.adapters import HuggingFaceModel
from convexprune.adapters._gradients import loss_fisher
from convexprune.constraints import Coded, Quantized, Unstructured, parse_pattern
from convexprune.constraints._codebook import OnGrid
from convexprune.errors import ConvexpruneError, RecipeError
from convexprune.pruners import LayerProblem
from convexprune.quantizers import GPTAQ, GPTQ, QEP, QUANTIZERS
from convexprune.recipe import make_recipe


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_what_is_kept_is_on_a_grid(tiny_llama: HuggingFaceModel, sparsity: float, quantizer: str):
    grid: dict[str, Any] = {"quantize": "int4", "group_size": 32, "quantizer": quantizer, "ignore": ["down_proj"]}
    report = convexprune.prune(tiny_llama.model, sparsity=sparsity, **grid, **SMALL).report
    weights = state(tiny_llama)
    for o in report.operators:
        weight = weights[f"{o.name}.weight"]
        assert o.pattern == f"unstructured {sparsity:.0%} per matrix, int4 in groups of 32"
        assert o.expected_zeros == sparsity * weight.numel() <= o.zeros == int((weight == 0).sum())
        assert max(len(group.unique()) for row in weight for group in row.split(32)) <= 16


@pytest.mark.parametrize(
    ("kind", "spaces"), [(GPTAQ, ("inputs", "inputs")), (QEP, ("inputs", None)), (GPTQ, ("inputs", "outputs"))]
)
def test_quantizers_get_the_errors_that_they_correct(
    tiny_llama: HuggingFaceModel, kind: type[GPTQ], spaces: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
):
    """GPTAQ those of inputs, also where those of outputs are cheaper; QEP none for a layer's last stage."""
    seen, on_grid = [], kind.on_grid

    def watched(self: GPTQ, problem: LayerProblem, *more: Any) -> OnGrid:
        cross = problem.moments.cross
        square = cross is not None and cross.shape[0] == cross.shape[1]
        seen.append(None if cross is None else "inputs" if square else "outputs")
        return on_grid(self, problem, *more)

    monkeypatch.setattr(kind, "on_grid", watched)
    settings: dict[str, Any] = {"quantizer": kind.__name__.lower(), "quantize": "int8", "group_size": -1}
    settings |= {"prefix": "pruned", "error_target": "operator"}
    convexprune.prune(tiny_llama.model, sparsity=0, **settings, **SMALL)
    assert seen[-2:] == list(spaces) and len(seen) == 2 * 4


def test_a_layer_s_error_is_none_that_gptaq_corrects():
    with pytest.raises(RecipeError, match="error_target='residual_stream' is another error"):
        make_recipe(quantizer="gptaq", error_target="residual_stream", quantize="int4")


def test_int8_per_output_channel_is_rounding_to_nearest(tiny_llama: HuggingFaceModel):
    before = state(tiny_llama)
    settings: dict[str, Any] = {"sparsity": 0, "quantize": "int8", "group_size": -1, "quantizer": "rtn"}
    report = convexprune.prune(tiny_llama.model, **settings, **SMALL).report
    for o in report.operators:
        weight, dense = state(tiny_llama)[f"{o.name}.weight"], before[f"{o.name}.weight"]
        largest = dense.abs().amax(1, keepdim=True)
        assert o.pattern == "unstructured 0% per matrix, int8 per output channel" and o.expected_zeros == 0
        assert all(len(row.unique()) <= 256 for row in weight)
        assert bool(((weight - dense).abs() <= 1.06 * largest / 128).all()) and 0 < o.relative_error < 1e-3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantize": "int2"}, r"Unknown grid 'int2'\. .*Known: fp4, int3, int4"),
        (
            {"quantize": "int4", "group_size": 48},
            "int4 in groups of 48: groups are 32, 64, 128 columns, or -1",
        ),
        ({"quantize": "int4", "pattern": "channels"}, "prune twice, the smaller model last"),
        ({"pattern": "int8"}, "Unknown pattern 'int8'.*quantize='int4' puts what is kept on a grid"),
        ({"quantize": "int4", "bits": 3}, "bits=3.0 is in place of quantize='int4': leave one of them out"),
        ({"bits": 0.5}, "bits=0.5: Input should be greater than or equal to 1"),
        ({"quantizer": "awq"}, "quantizer='awq': Input should be 'descent', 'gptaq', 'gptq', 'qep' or 'rtn'"),
    ],
)
def test_grids_that_there_are_not_are_refused_before_any_work(settings: dict[str, Any], reason: str):
    with pytest.raises(ConvexpruneError, match=reason):
        convexprune.prune("no such model", **settings)


@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_coded_weights_take_the_bits_that_they_may(tiny_llama: HuggingFaceModel, sparsity: float):
    report = convexprune.prune(tiny_llama.model, sparsity=sparsity, bits=3, **SMALL).report
    sizes = [o.outputs * o.inputs for o in report.operators]
    shares, weights = list[float](), state(tiny_llama)
    for o in report.operators:
        found = parse_pattern(o.pattern)
        assert (
            found.violation(weights[f"{o.name}.weight"]) == 0
            and o.zeros >= o.expected_zeros == sparsity * o.outputs * o.inputs
        )
        shares.append(float(str(found.grid).split()[0]))
    assert sum(map(mul, sizes, shares)) / sum(sizes) == pytest.approx(3, abs=1e-3) and len(set(shares)) > 1


@torch.no_grad()
def test_zero_weights_take_the_fewest_bits_that_fit_and_err_by_nothing(tiny_llama: HuggingFaceModel):
    for parameter in tiny_llama.model.get_submodule("model.layers").parameters():
        parameter.mul_(parameter.ndim < 2)
    report = convexprune.prune(tiny_llama.model, sparsity=0, bits=3, **SMALL).report
    assert report.operators and all(o.relative_error == 0 for o in report.operators)


def test_bits_on_the_whole_are_those_asked_for_and_owl_has_none_to_spread(tiny_llama: HuggingFaceModel):
    asked = Quantized(Unstructured(0.0), Coded(3.0))
    fisher = loss_fisher(tiny_llama, TOKENS[:4]).outputs
    units = survey(tiny_llama, TOKENS.split(1), 1, candidates(asked), fisher)
    for unit in units:  # more bits err less; 16 rows have no room for the scales of 1.5 bits
        fitting = candidates(asked)[: 2 if unit.name.endswith(("k_proj", "v_proj")) else 3]
        assert sorted(unit.costs, key=unit.costs.__getitem__) == fitting
    found = allocate_by_rule(units, "curve", asked).patterns(asked)
    bits = {name: float(str(pattern.grid).split()[0]) for name, pattern in found.items()}
    assert sum(u.size * bits[u.name] for u in units) / sum(u.size for u in units) == pytest.approx(3, abs=1e-3)
    assert max(bits.values()) - min(bits.values()) > 0.1
    with pytest.raises(RecipeError, match=r"'owl' spreads zeros, and .* 3\.0 bits a weight has bits to spread: take"):
        allocate_by_rule(units, "owl", asked)


@pytest.mark.long
def test_a_coded_run_goes_on_where_it_stopped_and_is_verified_and_packed(build, tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "dense")
    settings: dict[str, Any] = {**SETTINGS, "sparsity": 0, "bits": 4}
    whole = convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "whole", **settings)

    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "again", on_progress=stop_after(1), **settings)
    again = convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "again", resume=True, **settings)
    weights = [name for name in whole.report.files if name.endswith(".safetensors")]
    assert weights and all(again.report.files[name] == whole.report.files[name] for name in weights)
    found = convexprune.verify(tmp_path / "whole", dataset=SETTINGS["dataset"])
    assert found.errors and not found.miscounted and not found.faults
    convexprune.unpack(convexprune.pack(tmp_path / "whole", tmp_path / "pack").output_dir, tmp_path / "plain")
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in weights)
