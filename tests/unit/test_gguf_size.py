"""A GGUF file of a size: types for operators, embedding and head by forecast loss, in as many bytes or few less."""

import json
import re
import shlex
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import LlamaCpp
from runs import checksums
from safetensors.torch import load_file
from test_gguf import RUN, YARN, as_float32, built, exported, quantized, read
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import convexprune
from convexprune._api.calls import plan
from convexprune._cli import app
from convexprune._container.gguf_file import measure
from convexprune._container.layouts import Size
from convexprune.adapters import EMBEDDED, on_grid
from convexprune.adapters._types import _step
from convexprune.core._allocation import choose
from convexprune.errors import ModelError, PatternError, RecipeError

options = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000).map(float)), min_size=1, max_size=4)


@given(st.lists(options, min_size=1, max_size=4), st.integers(1, 200))
def test_no_choice_within_the_budget_is_cheaper(units: list[list[tuple[int, float]]], budget: int):
    every = list(product(*units))
    costs = [sum(cost for _, cost in each) for each in every if sum(size for size, _ in each) <= budget]
    if not costs:
        with pytest.raises(PatternError, match="No choice of sizes"):
            choose(units, budget)
        return
    chosen, bound = choose(units, budget)
    taken = [unit[k] for unit, k in zip(units, chosen, strict=True)]
    assert sum(size for size, _ in taken) <= budget
    assert sum(cost for _, cost in taken) == pytest.approx(min(costs), abs=1e-3)
    assert bound <= min(costs) + 1e-3


def size_of(source: Path, dtype: torch.dtype = torch.bfloat16) -> Size:
    stored = [name.removesuffix(".weight") for name in load_file(source / "model.safetensors")]
    ends = [name for name in ("model.embed_tokens", "lm_head") if name in stored]
    return measure(source, [[name] for name in stored if name.endswith("_proj")], ends, dtype)


def record_of(run: Path) -> Any:
    return convexprune.Report.from_json((run / "report.json").read_text()).sized


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.long)])
def test_a_file_has_the_bytes_that_were_asked_for_or_few_less(family: str, tmp_path: Path):
    source = built(family, tmp_path / "dense", torch.bfloat16)
    size = size_of(source)
    weights = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    target = (3 * size.least + 2 * size.most) // 5 if family == "llama" else int(weights * 5.25 / 8)
    asked: Any = {"target": target} if family == "llama" else {"quantize": "gguf", "bits": 5.25}
    run = quantized(source, tmp_path / "run", sparsity=None, **asked)
    path, record = exported(run, tmp_path / "a-name-that-is-longer.gguf"), record_of(run)
    assert path.stat().st_size == record["bytes"] <= record["target"] == target
    assert record["bits"] == pytest.approx(8 * path.stat().st_size / weights, abs=1e-4)
    steps = [
        other - nbytes for name, (_, nbytes) in record["tensors"].items() for other in size.units[(name,)].values()
    ]
    assert target - path.stat().st_size < min(step for step in steps if step > 0)
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}
    there, here = read(path), load_file(run / "model.safetensors")
    assert types["blk.1.ffn_down.weight"] == record["tensors"]["model.layers.1.mlp.down_proj"][0]
    assert types["token_embd.weight"] == record["tensors"]["model.embed_tokens"][0] != "bf16"
    assert torch.equal(there["token_embd.weight"].bfloat16(), here["model.embed_tokens.weight"])
    assert ("output.weight" in types) == (family == "qwen2") == ("lm_head" in record["tensors"])
    if family == "qwen2":
        assert torch.equal(there["output.weight"].bfloat16(), here["lm_head.weight"])
    moved = run.rename(tmp_path / "another-folder-name")
    assert exported(moved, tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def refused(source: Path, **settings: Any) -> str:
    with pytest.raises((PatternError, RecipeError)) as caught:
        convexprune.prune(source, output_dir=source.with_name("none"), **RUN | settings)
    assert not source.with_name("none").exists()
    return str(caught.value)


def test_what_cannot_be_had_is_refused_before_any_work(tmp_path: Path):
    source = built("llama", tmp_path / "dense", torch.bfloat16)
    least, most = size_of(source).least, size_of(source).most
    for target in (least - 1, most + 1):
        told = refused(source, target=target)
        assert (
            f"A file of {target:,} bytes was asked for. Accepted: {least:,} " in told and f"to {most:,} bytes" in told
        )
    for bits in (0.1 * least / size_of(source).weights, 16):  # a size may be more than the six bits of a pack
        told = refused(source, quantize="gguf", bits=max(1, bits))
        assert f"{8 * least / size_of(source).weights:.2f} to {8 * most / size_of(source).weights:.2f} bits" in told
    assert "6 can be had" in refused(source, bits=7)
    assert "Take 'gguf'" in refused(source, quantize="q4_k", target="1MB")
    assert "give target (900MB, say)" in refused(source, quantize="gguf")
    assert "has no zero" in refused(source, target="1MB", sparsity=0.5)
    assert "'curve', 'measured'" in refused(source, target="1MB", allocation="uniform")
    assert re.search("group_size=32 beside quantize='q4_k'.*Leave", refused(source, quantize="q4_k", group_size=32))
    asked: Any = RUN | {"target": (least + most) // 2, "sparsity": None}
    told = " ".join(plan(model=source, output_dir=tmp_path / "none", **asked).notes)
    assert f"{(least + most) // 2:,} bytes was asked for. Accepted: {least:,} " in told
    with pytest.raises(RecipeError, match="needs output_dir"):
        convexprune.prune(source, **RUN | {"target": most, "sparsity": None})


@pytest.mark.long
def test_measured_types_are_better_where_a_step_adds_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = built("llama", tmp_path / "dense", torch.bfloat16)
    size, kept = size_of(source), list[int]()  # of the first layer
    for dearer in "01":

        def added(model: Any, batches: Any, trial: Any, dearer: str = dearer) -> dict[str, float]:
            assert trial.patterns[0].grid.bits > trial.patterns[1].grid.bits and set(trial.states) > {"pruned"}
            names = {name for each in trial.groups.values() for name in each}
            return {name: 1.0 if name.endswith(f"layers.{dearer}") else 0.01 for name in names}

        monkeypatch.setattr("convexprune.adapters._allocating.added_divergences", added)
        asked: Any = {"target": (size.least + size.most) // 2, "sparsity": None, "allocation": "measured"}
        run = quantized(source, tmp_path / dearer, **asked)
        tensors = record_of(run)["tensors"].items()
        kept.append(sum(nbytes for name, (_, nbytes) in tensors if name.startswith("model.layers.0.")))
    assert kept[0] > kept[1]


def test_the_step_of_measured_types_is_between_types_that_all_can_have():
    units = {("a", "b"): {"q8_0": 85, "q4_k": 45, "iq4_xs": 43, "q3_k": 34}, ("c",): {"q8_0": 17, "q4_0": 9}}
    with pytest.raises(PatternError, match=r"compares two types for all operators, and q8_0 fits all\. Take 'curve'"):
        _step(units, 100)
    units["c",] = {kind: nbytes // 5 for kind, nbytes in units["a", "b"].items()}
    steps = {200: "q8_0 q4_k", 60: "q4_k q3_k", 41: "q3_k iq4_xs", 1: "q3_k iq4_xs"}
    for room, names in steps.items():
        assert _step(units, room) == tuple(map(on_grid, names.split()))
    with pytest.raises(PatternError, match=r"types of two sizes.* and iq4_nl or q4_0 fits all"):
        _step({("a",): {"q4_0": 45, "iq4_nl": 45}}, 50)


def routed(model: Any, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits, and True for tokens before the first whose router is next to a tie: rounding may take another
    expert there, and later tokens attend to such a token."""
    margins = list[Tensor]()

    def watch(gate: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        scores = (inputs[0].flatten(0, -2) @ gate.weight.T).sort(-1, descending=True).values
        taken = model.config.num_experts_per_tok
        margins.append((scores[:, taken - 1] - scores[:, taken]) / scores.std())

    for gate in (module for name, module in model.named_modules() if name.endswith("mlp.gate")):
        gate.register_forward_hook(watch)
    logits = model(window[None]).logits[0]
    return logits, (torch.stack([torch.full((len(window),), torch.inf), *margins]).amin(0) > 0.02).cumprod(0).bool()


@pytest.mark.llamacpp
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3moe"])
def test_llama_cpp_opens_a_file_of_a_size(family: str, tmp_path: Path):
    source = built(family, tmp_path / "dense", torch.bfloat16)
    run = quantized(source, tmp_path / "run", quantize="gguf", bits=4.75, sparsity=None)
    path, record = exported(run, tmp_path / "model.gguf"), record_of(run)
    assert path.stat().st_size == record["bytes"] <= record["target"] < 1.01 * record["bytes"]
    window = torch.arange(3, 60)
    with torch.no_grad():
        here, sure = routed(AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32), window)
    there = LlamaCpp(as_float32(path, tmp_path / "float32.gguf"), 64).logits(window)
    assert int(sure.sum()) >= 16
    spread = (here - here.mean(-1, keepdim=True))[sure].norm()
    assert float((there - here)[sure].norm() / spread) < 0.02  # bfloat16 weights here
    assert LlamaCpp(path, 64).logits(window).isfinite().all()


@pytest.mark.llamacpp
def test_the_commands_from_an_instruct_model_to_a_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = Path(__file__).parents[2] / "docs" / "quantize.md"
    block = page.read_text().split("### From an instruct model to a chat")[1].split("```")[1]
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("convexprune")]
    monkeypatch.chdir(tmp_path)
    source, tokenizer = built("llama", Path("MODEL"), torch.bfloat16), AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(source)
    chats = [[{"role": "user", "content": f"What is a {word}?"}] for word in ("whale", "ship", "sail", "sea") * 20]
    Path("chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    Path("test.txt").write_text("The whale and the ship. " * 40)
    for words in commands:
        small = ["--nsamples", "4", "--seqlen", "32", "--held-out-samples", "0"] if words[0] == "prune" else []
        result = CliRunner().invoke(app, [word.replace("100MB", "2MB") for word in words] + small)
        assert result.exit_code == 0, result.output
    path = Path("model.gguf")
    assert len(commands) == 5 and 1_950_000 < path.stat().st_size <= 2_000_000
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    prompt = tokenizer.apply_chat_template(chats[0], tokenize=False)
    file, ids = LlamaCpp(as_float32(path, Path("float32.gguf")), 64), tokenizer(prompt).input_ids
    assert file.tokens(prompt) == ids
    model = AutoModelForCausalLM.from_pretrained("DIR", dtype=torch.float32)
    for _ in range(4):  # a reply, word by word
        with torch.no_grad():
            here = model(torch.tensor([ids])).logits[0, -1]
        assert int(file.logits(torch.tensor(ids))[-1].argmax()) == int(here.argmax())
        ids = [*ids, int(here.argmax())]


TOKENS = (EMBEDDED / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": TOKENS}, r"tokenizer\.json has a token 4,095, the embedding ends at 511"),
        ({"tokenizer.json": "{"}, r"model: its tokenizer cannot be read \("),
        ({"tokenizer.json": TOKENS, "tokenizer_config.json": "["}, r"model: its tokenizer cannot be read \("),
    ],
)
def test_a_tokenizer_of_another_model_makes_no_file(dense: Path, tmp_path: Path, files: dict[str, str], message: str):
    folder = shutil.copytree(dense, tmp_path / "model")
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        convexprune.export(folder, tmp_path / "model.gguf", "gguf")


@pytest.mark.slow
def test_a_result_of_a_size_is_packed_verified_and_repeated(tmp_path: Path):
    source = built("qwen2", tmp_path / "dense", torch.bfloat16)
    least, most = size_of(source).least, size_of(source).most
    run = quantized(source, tmp_path / "run", sparsity=None, target=(least + most) // 2)
    expected = checksums(run)
    pack = convexprune.pack(run, tmp_path / "pack").output_dir
    assert checksums(convexprune.unpack(pack, tmp_path / "unpacked")) == expected
    again = convexprune.prune(recipe=run, dataset=RUN["dataset"], output_dir=tmp_path / "again")
    assert checksums(tmp_path / "again") == expected and again.report.sized == record_of(run)
    assert convexprune.verify(run, dataset=RUN["dataset"], operators=["model.layers.0.mlp.down_proj"]).passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, r"blk\.4\.\w+\.weight is not there, as it would be by config"),
        ({"num_key_value_heads": 1}, r"blk\.0\.attn_k\.weight is \[16, 16\], not \[8, 16\], as it would be by config"),
        ({"intermediate_size": 25}, r"blk\.0\.ffn_down\.weight is \[16, 24\], not \[16, 25\]"),
        ({"vocab_size": 513}, r"token_embd\.weight is \[512, 16\], not \[513, 16\]"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0 in config.json, no positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None in config.json"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6' in config.json"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings is 1099511627776 in config.json"),
        ({"rope_parameters": [1]}, r"rotary embeddings of type \[1\] cannot be written"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta is None in config.json"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None in config.json"),
        ({"rope_parameters": {"rope_type": {}}}, "rotary embeddings of type {} cannot be written"),
        ({"rope_parameters": YARN | {"beta_fast": 8}}, "beta_fast is 8; llama.cpp computes llama with 32"),
        ({"architectures": [{}]}, "{} cannot be written as GGUF"),
        (None, r"config\.json cannot be read \(.*\)\. Copy"),
        ([], r"config\.json holds no settings"),
    ],
)
def test_a_configuration_of_another_model_makes_no_file(dense: Path, tmp_path: Path, change: Any, message: str):
    folder = shutil.copytree(dense, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    text = "{" if change is None else json.dumps(config | change if change else change)
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        convexprune.export(folder, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()
    if change and "num_hidden_layers" in change:
        assert "not there" in str(convexprune.advise(folder, bits=4).notes)


def test_llama_3_is_written_as_meta_publishes_it(tmp_path: Path):
    folder = built("llama3", tmp_path / "model")
    expected = exported(folder, tmp_path / "new.gguf").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    theta = config["rope_parameters"].pop("rope_theta")
    config |= {"rope_scaling": config.pop("rope_parameters"), "rope_theta": theta}  # as transformers 4 writes it
    (folder / "config.json").write_text(json.dumps(config))
    assert exported(folder, tmp_path / "old.gguf").read_bytes() == expected


def test_a_mixture_with_dense_layers_is_refused(tmp_path: Path):
    folder = built("qwen3moe", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [1]}))
    with pytest.raises(ModelError, match=r"mlp_only_layers is \[1\]; llama.cpp computes qwen3moe with \[\]"):
        convexprune.export(folder, tmp_path / "model.gguf", "gguf")
