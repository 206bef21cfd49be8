"""Advice: sizes follow from the model's, every figure stands in the docs, and a target is reached or not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_gguf import built, quantized
from tiny_families import FAMILIES, TOKENS, build_family
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM
from typer.testing import CliRunner

import convexprune
from convexprune._cli import app
from convexprune._runs.folder import RunFolder
from convexprune.adapters import HuggingFaceModel
from convexprune.errors import ModelError, RecipeError
from convexprune.recipe import make_recipe
from convexprune.validation._advice import Way, advise, measured

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tiny_llama: HuggingFaceModel, tmp_path: Path) -> Path:
    tiny_llama.model.half().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("way", measured(), ids=lambda way: way.name)
def test_every_figure_stands_in_the_docs_and_every_command_is_one(way: Way):
    text = (ROOT / way.source).read_text()
    figures = (way.perplexity, way.dense) if way.arguments else (way.disk,)
    assert all(re.search(rf"\b{figure:g}", text) for figure in figures)
    pairs = re.findall(r"--(\S+) (\S+)", way.arguments)
    make_recipe(**{name.replace("-", "_"): float(v) if re.fullmatch(r"[\d.]+", v) else v for name, v in pairs})


def test_sizes_are_those_of_the_model(folder: Path, tiny_llama: HuggingFaceModel):
    found = advise(folder, bits=16.0)
    weights = sum(p.numel() for p in {id(p): p for p in tiny_llama.model.parameters()}.values())
    assert found.nbytes == 2 * weights
    assert advise(folder, target="4GiB").target == "4,294.97 MB on disk"  # as the table has sizes
    for each in found.ways:
        assert each.disk == pytest.approx(each.bits * weights / 8, abs=1) and each.reaches
        assert each.faster == pytest.approx(found.nbytes / each.memory, rel=1e-3)


@pytest.mark.parametrize(
    "target", [{"target": "60KB"}, {"target": "60KB", "memory": True}, {"bits": 9.0}, {"speed": 1.1}]
)
def test_what_reaches_the_target_comes_first_and_of_that_the_best(folder: Path, target: dict[str, Any]):
    ways = advise(folder, **target).ways
    assert [each.reaches for each in ways] == sorted((each.reaches for each in ways), reverse=True)
    for reaches in (True, False):
        times = [each.way.times for each in ways if each.reaches == reaches]
        assert times == sorted(times)


def test_the_command_says_what_to_run_or_that_nothing_reaches_it(folder: Path):
    result = CliRunner().invoke(app, ["advise", str(folder), "--bits", "15"])
    assert result.exit_code == 0 and f"convexprune pack {folder} OUT" in result.stdout
    assert "An estimate, by measurements on SmolLM2-135M" in result.stdout
    nothing = CliRunner().invoke(app, ["advise", str(folder), "--bits", "0.5"]).stdout
    assert "No measured way reaches" in nothing
    smallest = min(least for least, _ in advise(folder, bits=0.5).files.values())
    assert f"The smallest of the files above has {smallest:,} bytes" in " ".join(nothing.split())
    result = CliRunner().invoke(app, ["advise", str(folder), "--bits", "15", "--json"])
    assert json.loads(result.stdout)["ways"][0]["reaches"] is True


@pytest.mark.parametrize("target", [{"target": "4GB"}, {"bits": 16.0}])
def test_a_model_that_is_as_it_should_be_is_left_as_it_is(folder: Path, target: dict[str, Any]):
    found = advise(folder, **target)
    assert found.ways[0].commands == ()
    told = f"{found.target}: the model as it is, in 16 bits. Nothing has to be done."
    assert [*found.verdict()] == [*found.notes, told]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_of_other_formats_are_those_of_the_commands(tiny_llama: HuggingFaceModel, tmp_path: Path, dtype: Any):
    """Packs were measured in bfloat16: their commands make one, and float16 values as they are take more bits."""
    folder = tmp_path / "a model"
    tiny_llama.model.to(dtype).save_pretrained(folder)
    found = advise(folder, target="1MB")
    packs = [each for each in found.ways if each.way.then == "pack"]
    coded, pruned = (next(each for each in packs if bool(each.way.arguments) == own) for own in (False, True))
    assert pruned.commands[0].startswith(f"convexprune prune '{folder}' ") and "bfloat16" in pruned.commands[0]
    if dtype == torch.float16:
        assert coded.commands == (f"convexprune pack '{folder}' OUT",)
        packed = convexprune.pack(folder, tmp_path / "packed").output_dir
        assert sum(f.stat().st_size for f in packed.glob("*.*")) == pytest.approx(coded.disk, rel=0.1)
    else:
        assert "--sparsity 0 --dtype bfloat16" in coded.commands[0] and coded.bits == pytest.approx(10.6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "granitemoe", "mixtral"])
def test_a_way_that_export_refuses_is_left_out(family: str, tmp_path: Path):
    """Mixtral has its experts in one tensor in memory, and apart on disk."""
    sizes: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = build_family(family) if family in FAMILIES else GraniteMoeForCausalLM(GraniteMoeConfig(**sizes))
    model.save_pretrained(tmp_path / "dense")
    run = quantized(tmp_path / "dense", tmp_path / "run", quantize="int4", group_size=-1, dataset=TOKENS % 100 + 2)
    try:
        convexprune.export(run, tmp_path / "out")
    except ModelError as refusal:
        assert "The layout takes Linear modules only" in str(refusal)
    found = advise(tmp_path / "dense", speed=1.01)
    taken = [each.commands[-1] for each in found.ways if each.way.then == "export"]
    assert taken == (["convexprune export DIR OUT"] if (tmp_path / "out").exists() else [])
    told = [note for note in found.verdict() if "Without int4 for engines, which export refuses: " in note]
    warned = [warning for warning in RunFolder(run).report().warnings if "will refuse the result" in warning]
    assert len(told) == len(warned) == 1 - len(taken)
    if family == "gpt2":
        assert len(advise(tmp_path / "dense" / "config.json", speed=1.01).ways) == len(found.ways)


def test_memory_is_of_a_target(folder: Path):
    with pytest.raises(RecipeError, match="memory is of target, and bits is given"):
        advise(folder, bits=9.5, memory=True)


@pytest.mark.parametrize("target", [{}, {"bits": 3.0, "speed": 2.0}])
def test_one_target_is_asked_for(folder: Path, target: dict[str, float]):
    with pytest.raises(RecipeError, match=r"needs a single target.*Accepted: target='4GiB'"):
        convexprune.advise(folder, **target)


@pytest.mark.long
def test_whole_files_have_the_bytes_that_were_told_beforehand(tmp_path: Path):
    source = built("llama", tmp_path / "dense", torch.bfloat16)
    told = advise(source, target="3MB").files
    for options, name in (("int4 --group-size 64", "int4"), ("q4_k", "q4_k"), ("q8_0", "q8_0")):
        run = quantized(source, tmp_path / name, quantize=name)
        out = tmp_path / f"{name}.out"
        convexprune.export(run, out, "compressed-tensors" if name == "int4" else "gguf")
        nbytes = (out / "model.safetensors" if name == "int4" else out).stat().st_size
        least, most = told[f"--quantize {options}"]
        # The header of a GGUF file has the name of the folder, and what its card says.
        assert least == most and abs(nbytes - least) < (1 if name == "int4" else 1000)
    for layout in ("gguf", "compressed-tensors"):
        least, most = told[f"--quantize {layout} --target SIZE"]
        assert least < most < 2 * sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    text = CliRunner().invoke(app, ["advise", str(source), "--target", "3MB"]).stdout
    assert f"{least:,} to {most:,}, as asked" in text
