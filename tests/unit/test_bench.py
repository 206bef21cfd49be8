"""Formats multiply by the weight that they were given, and `bench` times them in turns."""

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from convexprune import _cli as cli
from convexprune import errors
from convexprune.adapters import HuggingFaceModel
from convexprune.validation import _timing as room
from convexprune.validation._bench import _decode, _new_tokens, bench
from convexprune.validation._formats import FORMATS, GROUP, Int8, SemiStructured
from convexprune.validation._timing import Timing, timing

ON_GPUS = ("2:4, bfloat16",)
ROUNDING = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 2e-2, f"int4, groups of {GROUP}": 0.2, "CSR, float32": 1e-6}


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("is_transposed", [False, True])  # as of a Conv1D
def test_a_format_multiplies_by_its_weight_and_counts_its_bytes(name: str, is_transposed: bool):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator) * (torch.rand(32, 128, generator=generator) < 0.5)
    bias, x = torch.randn(32, generator=generator), torch.randn(2, 3, 128, generator=generator)
    product = FORMATS[name](weight.T.contiguous().T if is_transposed else weight, bias)
    y = product(x.to(product.dtype)).float()
    assert y.shape == (2, 3, 32)
    assert (y - (x @ weight.T + bias)).norm() <= ROUNDING[name] * y.norm()
    kept = int((weight != 0).sum())
    expected = {"float32": 4 * 4096, "bfloat16": 2 * 4096, "int8": 4096 + 2 * 32, "CSR, float32": 8 * kept + 4 * 33}
    assert product.nbytes == expected.get(name, 4096 // 2 + 2 * 2 * 4096 // GROUP)


def test_a_format_that_cannot_be_here_says_why():
    assert SemiStructured.why_not(torch.zeros(4, 4)) == "it needs an NVIDIA GPU"
    assert "no multiple of 64" in str(FORMATS[f"int4, groups of {GROUP}"].why_not(torch.zeros(16, 32)))


def test_formats_are_timed_beside_the_dense_one_and_the_model_stays_as_it_was(
    tiny_llama: HuggingFaceModel, monkeypatch
):
    before = {name: t.clone() for name, t in tiny_llama.model.state_dict().items()}
    found = bench(tiny_llama.model, batches=(1, 2), prompt=8, new_tokens=2, seconds=0.1)
    assert all(torch.equal(t, before[name]) for name, t in tiny_llama.model.state_dict().items())
    assert found.dense == "float32" and found.zeros == 0
    assert found.left_out.keys() == {f"int4, groups of {GROUP}", *ON_GPUS}  # widths of 32 and 48
    keys = [(t.what, t.batch, t.format) for t in found.timings]
    assert len(keys) == len(set(keys)) == 4 * 3  # formats; a prompt, and batches of generation
    assert all(t.milliseconds > 0 and t.over_dense > 0 for t in found.timings)
    assert all(t.over_dense == 1 for t in found.timings if t.format == "float32")
    decoded = next(t for t in found.timings if t.what == "decode" and t.batch == 2)
    assert decoded.tokens_per_second == pytest.approx(2e3 / decoded.milliseconds)
    assert len(json.loads(json.dumps(found.to_json()))["verdict"]) == len(FORMATS)
    assert found.verdict()[-1].startswith("Tokens/s at batch 1 on cpu, 1 threads: float32 ")


def test_a_batch_is_timed_once_and_rates_are_of_the_least(tiny_llama: HuggingFaceModel):
    found = bench(tiny_llama.model, batches=(3, 2, 3), prompt=4, new_tokens=1, seconds=0.1)
    assert [t.batch for t in found.timings if (t.what, t.format) == ("decode", "float32")] == [3, 2]
    assert found.verdict()[-1].startswith("Tokens/s at batch 2 on cpu, 1 threads: float32 ")


def test_prompts_and_generation_end_where_the_model_cannot_see_on(tiny_llama: HuggingFaceModel, monkeypatch):
    cls: Any = type(tiny_llama.model)
    longest, generate = [], cls.generate

    def watched(model, *args, **options):
        longest.append(options["max_new_tokens"])
        return generate(model, *args, **options)

    monkeypatch.setattr(cls, "generate", watched)
    monkeypatch.setattr(HuggingFaceModel, "max_positions", 8)
    found = bench(tiny_llama.model, batches=(1,), prompt=512, new_tokens=64, seconds=0.1)
    rates = [t.tokens_per_second * t.milliseconds / 1e3 for t in found.timings if t.what == "prefill"]
    assert rates == [pytest.approx(8)] * len(rates)
    assert set(longest) == {7}


def test_a_product_that_this_torch_lacks_is_left_out_and_told(tiny_llama: HuggingFaceModel, monkeypatch):
    monkeypatch.setattr(Int8, "product", lambda self, x: torch.ops.aten._no_such_product(x, self.codes, self.scale))
    found = bench(tiny_llama.model, batches=(1,), prompt=4, new_tokens=1, seconds=0.1)
    assert all(t.format != "int8" for t in found.timings)
    (told,) = [line for line in found.verdict() if line.startswith("int8")]
    assert told.startswith(f"int8: not timed here: torch {torch.__version__}: ") and "_no_such_product" in told


@pytest.mark.parametrize(
    ("over_dense", "middle_half", "said"),
    [
        (2.0, (1.8, 2.2), "2.00 times as slow"),
        (0.5, (0.4, 0.6), "2.00 times as fast"),
        (1.1, (0.9, 1.2), "as fast, as"),
    ],
)
def test_the_verdict_knows_what_noise_hides(over_dense, middle_half, said):
    assert said in Timing("decode", 1, "int8", 1.0, over_dense, middle_half, 1, 5, 1.0).verdict


def test_the_command_prints_tables_and_refuses_what_makes_no_sense(tiny_llama: HuggingFaceModel, tmp_path, monkeypatch):
    tiny_llama.model.save_pretrained(tmp_path / "model")
    run = CliRunner(env={"COLUMNS": "140"}).invoke
    short = ["--batch", "1", "--prompt", "4", "--new-tokens", "1", "--seconds", "0.1"]
    result = run(cli.app, ["bench", str(tmp_path / "model"), *short])
    assert result.exit_code == 0, result.output
    assert (
        "The whole model" in result.stdout and "2:4, bfloat16: not timed here: it needs an NVIDIA GPU." in result.stdout
    )
    with pytest.raises(errors.RecipeError, match="prompt=0"):
        bench(tmp_path / "model", prompt=0)


@pytest.mark.parametrize(("takes", "rounds"), [(0.15, 3), (0.4, 2), (0.6, 2), (2.0, 1)])
def test_what_takes_long_has_fewer_rounds(monkeypatch: pytest.MonkeyPatch, takes: float, rounds: int):
    now = [0.0]
    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])

    def run() -> int:
        now[0] += takes
        return 2

    times = room.time_in_turns({"dense": run, "int8": run}, "cpu", 1.0, lambda made: made)
    assert times == {name: pytest.approx([takes / 2] * rounds) for name in times}


def test_generation_ends_with_its_share_of_the_time_and_counts_its_tokens(tiny_llama: HuggingFaceModel):
    model = tiny_llama.model
    assert _new_tokens(_decode(model, 2, 5, "cpu", 600.0)()) == 5
    assert _new_tokens(_decode(model, 2, 5, "cpu", 1e-6)()) == 1


def test_the_middle_half_of_two_rounds_lies_between_them():
    found = timing("q_proj", 1, "csr", {"csr": [1.0, 9.0], "dense": [1.0, 1.0]}, "dense", nbytes=1, tokens=1)
    assert found.middle_half == (3.0, 7.0) and found.over_dense == 5.0


def test_what_is_timed_once_says_so():
    found = timing("decode", 1, "int8", {"int8": [2.0], "float32": [1.0]}, "float32", 1, 3)
    assert (found.rounds, found.over_dense, found.middle_half, found.tokens_per_second) == (1, 2.0, (2.0, 2.0), 1.5)
    assert found.verdict == "batch 1 2.00 times as slow (timed once)"
