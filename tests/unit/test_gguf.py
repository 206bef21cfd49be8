"""A model as a GGUF file has the values of the folder for the library `gguf`, and its logits for llama.cpp."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from llama_cpp import LlamaCpp
from runs import SETTINGS, on_reports
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import convexprune
from convexprune._cli import app
from convexprune.adapters import EMBEDDED
from convexprune.errors import ModelError, OutputError

SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip
MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3moe": ("Qwen3Moe", MIXTURE | {"num_experts": 3, "norm_topk_prob": True, "head_dim": 64}),
}
BY_DEFAULT: dict[str, Any] = {"quantizer_args": {}}
QUICK = {"quantizer_args": {"sweeps": 1, "rounds": 0, "beam": 1}}  # where only names, types and sizes count
RUN: dict[str, Any] = SETTINGS | QUICK | {"sparsity": 0}
HEADS = {"attn_q": 4, "attn_k": 2}


def built(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    name, more = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SIZES | more)
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)  # norms and biases that are not all alike
    model.to(dtype).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return folder


def read(path: Path) -> dict[str, Tensor]:
    """The values of each tensor in the file, with the rows of LLaMA's queries and keys as transformers has them."""
    reader = gguf.GGUFReader(path)
    rotates = reader.fields["general.architecture"].contents() == "llama"
    values = {}
    for tensor in reader.tensors:
        shape = tensor.shape.tolist()[::-1]
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            value = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).float().reshape(shape)
        else:
            value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shape)
        heads = next((n for part, n in HEADS.items() if part in tensor.name and "norm" not in tensor.name), None)
        if rotates and heads is not None:  # written out: pairs (2i, 2i + 1) of a head are (i, i + half) there
            half = len(value) // heads // 2
            order = [h * 2 * half + 2 * i + part for h in range(heads) for part in (0, 1) for i in range(half)]
            value = value[torch.tensor(order)]
        values[tensor.name] = value
    return values


def as_float32(path: Path, target: Path) -> Path:
    """The same file with all tensors dequantized: llama.cpp rounds what it multiplies blocks with."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *sub = field.types
            writer.add_key_value(name, field.contents(), kind, sub[-1] if sub else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def exported(source: Path, output: Path) -> Path:
    result = CliRunner().invoke(app, ["export", str(source), str(output), "--format", "gguf"])
    assert result.exit_code == 0, result.output
    return output


def quantized(source: Path, folder: Path, **settings: Any) -> Path:
    convexprune.prune(source, output_dir=folder, **RUN | settings)
    return folder


@pytest.mark.parametrize("name", ["q4_k", *(pytest.param(name, marks=pytest.mark.long) for name in ("q3_k", "iq4_nl"))])
def test_a_file_has_the_values_of_the_folder_in_the_type_that_was_asked_for(name: str, tmp_path: Path):
    source = built("llama", tmp_path / "dense", torch.bfloat16)
    run = quantized(source, tmp_path / "run", quantize=name, ignore=["o_proj"], **BY_DEFAULT)
    path = exported(run, tmp_path / "model.gguf")
    there, here = read(path), load_file(run / "model.safetensors")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.1.ffn_down.weight"] == types["blk.0.attn_k.weight"] == name.upper()
    assert types["blk.0.attn_output.weight"] == types["token_embd.weight"] == "BF16"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj", "attn_output": "self_attn.o_proj"}  # fmt: skip
    for theirs, ours in names.items():
        assert torch.equal(there[f"blk.1.{theirs}.weight"].bfloat16(), here[f"model.layers.1.{ours}.weight"])
    assert torch.equal(there["token_embd.weight"].bfloat16(), here["model.embed_tokens.weight"])
    assert "output.weight" not in there  # tied


def test_a_head_of_its_own_is_kept_though_the_configuration_ties_it(tmp_path: Path):
    tensors = load_file(path := built("llama", tmp_path) / "model.safetensors")
    save_file(tensors | {"lm_head.weight": (head := tensors["model.embed_tokens.weight"] + 1)}, path, {"format": "pt"})
    assert torch.equal(read(exported(tmp_path, tmp_path / "model.gguf"))["output.weight"], head)


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_experts_are_stacked_in_their_order(family: str, tmp_path: Path):
    run = quantized(built(family, tmp_path / "dense"), tmp_path / "run", quantize="q4_k")
    there, here = read(exported(run, tmp_path / "model.gguf")), load_file(run / "model.safetensors")
    place, up = ("block_sparse_moe", "w3") if family == "mixtral" else ("mlp", "up_proj")
    for number in range(3):
        own = here[f"model.layers.1.{place}.experts.{number}.{up}.weight"]
        assert torch.equal(there["blk.1.ffn_up_exps.weight"][number], own)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_gate_exps.weight"] == types["blk.0.ffn_down_exps.weight"] == "Q4_K"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"


INTS = (
    (BY_DEFAULT | {"quantize": "int4"}, "Q4_0"),
    ({"quantize": "int5"}, "Q5_0"),
    ({"quantize": "int8", "sparsity": 0.5}, "Q8_0"),
    (BY_DEFAULT, "F32"),
)


@pytest.mark.parametrize(("settings", "kind"), INTS)
def test_whole_numbers_become_blocks_without_loss(settings: dict[str, Any], kind: str, tmp_path: Path):
    run = quantized(built("qwen2", tmp_path / "dense"), tmp_path / "run", **settings)
    path = exported(run, tmp_path / "model.gguf")
    there, here = read(path), load_file(run / "model.safetensors")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == kind and types["output.weight"] == "F32"
    assert torch.equal(there["blk.0.attn_q.weight"], here["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(there["blk.0.attn_q.bias"], here["model.layers.0.self_attn.q_proj.bias"])


@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_inside_of_a_folder_are_not_the_model(sharded: bool, tmp_path: Path):
    """A trainer leaves them there, and folders come in any order."""
    source, other = built("qwen2", tmp_path / "dense"), built("qwen2", tmp_path / "other", torch.bfloat16)
    if sharded:
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size="2MB")
        (source / "model.safetensors").unlink()
    before = {name: tensor.data.tobytes() for name, tensor in tensors_of(exported(source, tmp_path / "a.gguf"))}
    for name in ("a-checkpoint", "z-checkpoint"):
        shutil.copytree(other, source / name)
    told = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "b.gguf"), "--format", "gguf"]).output
    assert {name: tensor.data.tobytes() for name, tensor in tensors_of(tmp_path / "b.gguf")} == before
    assert float(re.findall(r"([\d.]+) bits a weight of all", told)[0]) > 32
    if sharded:
        next(source.glob("model-00002*")).unlink()
        with pytest.raises(ModelError, match=r"names model-00002.*, which is missing"):
            convexprune.export(source, tmp_path / "c.gguf", "gguf")


def tensors_of(path: Path) -> list[tuple[str, Any]]:
    return [(tensor.name, tensor) for tensor in gguf.GGUFReader(path).tensors]


def test_what_has_no_safetensors_or_no_blocks_is_refused(tmp_path: Path):
    source = built("qwen2", tmp_path / "dense")
    saved = convexprune.prune(source, **RUN, quantize="q8_0").save(tmp_path / "saved")
    with pytest.raises(ModelError, match="Prune to a folder: a result in memory keeps no blocks"):
        convexprune.export(saved, tmp_path / "model.gguf", "gguf")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no safetensors file"):
        convexprune.export(source, tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_rows_that_are_no_whole_blocks_are_refused(name: str, tmp_path: Path, build: Callable[[str], PreTrainedModel]):
    build("llama").save_pretrained(tmp_path / "dense")  # its MLP has 48 channels
    run = quantized(tmp_path / "dense", tmp_path / "run", quantize=name, group_size=-1)
    told = rf"0\.mlp\.down_proj is {name} per output channel, with 48 columns, and blocks of GGUF have 32\..*--ignore"
    with pytest.raises(ModelError, match=told):
        convexprune.export(run, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()
    convexprune.export(run, tmp_path / "out")
    left = quantized(tmp_path / "dense", tmp_path / "left", quantize=name, group_size=-1, ignore=["down_proj"])
    exported(left, tmp_path / "left.gguf")


def test_what_cannot_be_written_is_refused(tmp_path: Path, build):
    build("opt").save_pretrained(tmp_path / "opt")
    with pytest.raises(ModelError, match=r"OPTForCausalLM cannot be written as GGUF. Known: LlamaForCausalLM"):
        convexprune.export(tmp_path / "opt", tmp_path / "model.gguf", "gguf")
    run = quantized(built("llama", tmp_path / "dense"), tmp_path / "run", quantize="q4_k")
    with pytest.raises(ModelError, match="has q4_k, which the layout pack-quantized cannot say"):
        convexprune.export(run, tmp_path / "out")
    (tmp_path / "taken.gguf").touch()
    with pytest.raises(OutputError, match="is there already"):
        convexprune.export(run, tmp_path / "taken.gguf", "gguf")
    kept = (run / "blocks.ggml").read_bytes()
    (run / "blocks.ggml").unlink()
    with pytest.raises(OutputError, match=r"blocks\.ggml is missing, by the checksums in report\.json"):
        convexprune.export(run, tmp_path / "model.gguf", "gguf")
    with pytest.raises(ModelError, match=r"blocks\.ggml has no model.layers.0.self_attn.q_proj"):
        convexprune.export(run, tmp_path / "model.gguf", "gguf", allow_changed=True)
    (run / "blocks.ggml").write_bytes(kept)
    shutil.copy(tmp_path / "dense" / "model.safetensors", run)
    with pytest.raises(ModelError, match="has changed since it was quantized"):
        convexprune.export(run, tmp_path / "model.gguf", "gguf", allow_changed=True)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    for changed, words in {
        ("hidden_act", "gelu"): "hidden_act is 'gelu'; llama.cpp computes llama with 'silu'",
        ("rope_parameters", None): "",
    }.items():
        key, value = changed
        value = {"rope_type": "longrope", "rope_theta": 1e4} if value is None else value
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ModelError, match=words or "rotary embeddings of type 'longrope'"):
            convexprune.export(tmp_path / "dense", tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.long
def test_a_run_that_was_interrupted_has_the_same_blocks(tmp_path: Path):
    source = built("qwen2", tmp_path / "dense")
    run = quantized(source, tmp_path / "whole", quantize="q4_k", prefix="pruned")

    def stop(report: Any) -> None:
        if report.name.startswith("model.layers.1"):
            raise KeyboardInterrupt

    settings: dict[str, Any] = RUN | {"quantize": "q4_k", "prefix": "pruned"}
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(source, output_dir=tmp_path / "run", on_progress=on_reports(stop), **settings)
    convexprune.prune(source, output_dir=tmp_path / "run", resume=True, **settings)
    assert (tmp_path / "run" / "blocks.ggml").read_bytes() == (run / "blocks.ggml").read_bytes()


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", ["dense", "q4_k", "iq4_nl", "q5_0"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_llama_cpp_computes_what_the_folder_does(family: str, name: str, tmp_path: Path):
    folder = built(family, tmp_path / "dense")
    if name != "dense":
        folder = quantized(folder, tmp_path / "run", quantize=name)
    path = exported(folder, tmp_path / "model.gguf")
    window = torch.arange(3, 60)
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(folder)(window[None]).logits[0]

    def apart(file: Path) -> float:
        there = LlamaCpp(file, 64).logits(window)
        return float((there - here).norm() / (here - here.mean(-1, keepdim=True)).norm())

    assert apart(as_float32(path, tmp_path / "float32.gguf")) < 1e-4
    assert apart(path) < (1e-4 if name == "dense" else 0.3)  # inputs are rounded to 8 bits


@pytest.mark.llamacpp
@pytest.mark.parametrize("pattern", ["channels", "heads", "layers"])
def test_smaller_models_are_written_too(pattern: str, tmp_path: Path):
    asked: Any = SETTINGS | {"sparsity": 0.5, "method": "convex", "pattern": pattern}
    convexprune.prune(built("llama", tmp_path / "dense"), output_dir=tmp_path / "small", **asked)
    folder = quantized(tmp_path / "small", tmp_path / "run", quantize="q8_0")
    path = as_float32(exported(folder, tmp_path / "model.gguf"), tmp_path / "float32.gguf")
    window = torch.arange(3, 60)
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(folder)(window[None]).logits[0]
    assert float((LlamaCpp(path, 64).logits(window) - here).norm() / here.norm()) < 1e-4


@pytest.mark.llamacpp
def test_llama_cpp_reads_text_as_the_tokenizer_does(tmp_path: Path):
    folder = built("llama", tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.save_pretrained(folder)
    file = LlamaCpp(exported(folder, tmp_path / "model.gguf"), 64)
    for text in ("The whale's 1234 teeth,\n\n and  naïve cafés: it isn't — 漢字 🦙!", " ", "a\tb  c</s>d"):
        assert file.tokens(text) == tokenizer(text).input_ids
