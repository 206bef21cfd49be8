"""`inspect` knows from a configuration what a run finds with the weights."""

import json
import time
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, build_family
from typer.testing import CliRunner

from convexprune import _cli as cli
from convexprune._layerwise.model import DecoderLayer, Group
from convexprune._runs import cost
from convexprune._runs.cost import Speed
from convexprune.adapters import BUNDLED, EMBEDDED, HuggingFaceModel, load
from convexprune.adapters._discovery.experts import fused_parameters
from convexprune.adapters._inspection import inspection
from convexprune.adapters._inspection.inspection import TRIALS, inspect
from convexprune.adapters._inspection.outline import device_bytes, read_outline, setting_of
from convexprune.errors import CalibrationError, ModelError, PatternError, RecipeError
from convexprune.recipe import make_recipe
from convexprune.validation._advice import advise
from convexprune.validation._timing import peak_memory

LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA_3N = {
    "model_type": "gemma3n_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip
GIB = 1 << 30


@pytest.fixture(autouse=True)
def known_speed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To time products takes a second or two, and once is enough."""
    if "quickly" not in request.node.name:
        monkeypatch.setattr(inspection, "measured_speed", lambda device, dtype: Speed(1e11, 1e11))


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_70B))
    return tmp_path / "config.json"


def run(*arguments: object):
    return CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, ["inspect", *(str(a) for a in arguments)])


def stages(layer: DecoderLayer) -> list[list[tuple[list[str], list[tuple[int, int]], bool]]]:
    def described(group: Group) -> tuple[list[str], list[tuple[int, int]], bool]:
        return [o.name for o in group.operators], [o.shape for o in group.operators], group.token_aligned

    return [[described(group) for group in stage] for stage in layer.stages]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_operators_are_those_that_a_run_finds(family: str, tmp_path: Path):
    model = build_family(family)
    model.config.save_pretrained(tmp_path)
    found, loaded = read_outline(tmp_path, make_recipe(model=str(tmp_path))), HuggingFaceModel(model)
    assert [layer.name for layer in found.layers] == [layer.name for layer in loaded.layers]
    assert list(map(stages, found.layers)) == list(map(stages, loaded.layers))
    assert dict(found.left_alone) == dict(loaded.left_alone)
    assert found.size.bytes == sum(p.nbytes for p in model.parameters())


def test_what_is_not_counted_is_said():
    assert not inspect(EMBEDDED).notes
    assert inspect(EMBEDDED).work.forward > inspect(EMBEDDED, allocation="uniform").work.forward
    assert inspect(EMBEDDED, bits=3, allocation="measured").notes == (TRIALS,)
    assert "was not checked" in inspect(EMBEDDED, target="10MB").notes[-1]


def test_the_bundled_model_is_as_when_it_is_loaded():
    found, model = inspect(EMBEDDED, sparsity=0.5), load(EMBEDDED, device="cpu")
    operators = [operator for layer in model.layers for operator in layer.operators]
    assert found.operators == len(operators) == 24
    assert found.weights == sum(o.shape[0] * o.shape[1] for o in operators)
    assert found.zeros == sum(o.shape[0] * o.shape[1] for o in operators) // 2
    assert dict(found.left_alone) == dict(model.left_alone)
    assert found.size.bytes == sum(p.nbytes for p in model.model.parameters())
    assert found.recipe["max_seq_length"] == model.max_positions
    assert found.fits and not list(found.verdict())
    named = inspect(BUNDLED, sparsity=0.5)
    assert (named.model, named.size, named.memory) == (BUNDLED, found.size, found.memory)


def test_llama_2_70b_is_answered_quickly_and_without_its_weights(llama_70b: Path):
    began = time.perf_counter()
    with peak_memory(torch.device("cpu")) as peak:
        found = inspect(llama_70b, device_memory=80 * GIB, error_correction=0)
    assert time.perf_counter() - began < 60  # seconds, on a machine that is shared
    assert peak.more is None or peak.more < GIB / 2
    assert found.operators == 560 and found.weights == 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    (layer,) = found.size.layers
    assert layer.count == 80
    shapes = [[(s.outputs, s.inputs) for s in stage] for stage in layer.stages]
    assert shapes == [[(10240, 8192)], [(8192, 8192)], [(57344, 8192)], [(8192, 28672)]]
    assert found.size.bytes == 2 * 68_976_648_192  # as its model card says
    assert found.fits and 60 * GIB < found.memory.device < 80 * GIB
    assert found.memory.host < 3 * GIB and found.work.problems == 320
    assert found.memory.disk > 2 * 2 * found.weights and all(lap > 0 for lap in found.seconds.values())


def test_what_does_not_fit_is_said_with_what_to_change(llama_70b: Path):
    assert run(llama_70b, "--device-memory", "80GiB").exit_code == 0
    result = run(llama_70b, "--device-memory", "62GiB")
    assert result.exit_code == 1, result.output
    printed = " ".join(result.output.split())
    assert "560 operators" in printed and "It does not fit:" in printed and "of 62.00 GiB" in printed
    assert "--allocation uniform: " in printed and "--error-correction 0: " in printed
    assert "--ignore mlp.down_proj" in printed
    less = ("--error-correction", 0, "--allocation", "uniform")
    assert run(llama_70b, "--device-memory", "62GiB", *less).exit_code == 0
    assert run(llama_70b, "--device-memory", "24GiB", "--method", "wanda").exit_code == 1


def test_json_has_all_the_numbers(tiny_llama: HuggingFaceModel, tmp_path: Path):
    tiny_llama.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # weights are not needed
    result = run(
        tmp_path, "--json", "--pattern", "2:4", "--ignore", "q_proj", "--device-memory", "24GiB", "--nsamples", 8
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["operators"] == 12 and found["zeros"] == found["weights"] // 2 and found["fits"]
    assert found["left_alone"]["model.layers.1.self_attn.q_proj"] == "ignored by the recipe"
    assert found["recipe"]["num_calibration_samples"] == 8 and found["device_memory"] == 24 * GIB


def test_experts_are_counted_each_and_a_model_that_fuses_them_is_whole(tmp_path: Path):
    model = HuggingFaceModel(build_family("mixtral"))
    model.model.config.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.operators == sum(len(layer.operators) for layer in model.layers)
    assert dict(found.left_alone) == dict(model.left_alone)
    layer, fused = found.size.layers[0], any(fused_parameters(module) for module in model.model.modules())
    assert sum(not s.token_aligned for s in layer.stacks) == 8  # of each of 4: gate and up, down
    assert sum(not group.token_aligned for group in model.layers[0].groups) == 8
    assert {s.share for s in layer.stacks} == {0.5, 1.0} and "even share" in found.notes[-1]
    assert found.size.whole == fused == ("loaded whole" in " ".join(found.notes))
    assert not fused or found.memory.layer > found.size.itemsize * layer.parameters


def test_what_depends_on_values_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = build_family("llama")
    model.config.save_pretrained(tmp_path)
    before = inspect(tmp_path)
    mlp = type(model.model.layers[0].mlp)
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: own(self, x) if x.sum() > 0 else own(self, -x))
    found = inspect(tmp_path)
    assert found.size == before.size and not found.notes


def test_fused_experts_are_never_in_memory(tmp_path: Path):
    experts = {"num_local_experts": 17, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    size = {"hidden_size": 4096, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = {"model_type": "llama4_text", "num_hidden_layers": 1, "vocab_size": 128, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config | size | experts))
    with peak_memory(torch.device("cpu")) as peak:
        found = inspect(tmp_path)
    assert found.memory.layer > 2 * 3 * 17 * 4096 * 8192
    assert peak.more is None or peak.more < GIB / 2
    assert found.operators == 4 + 3 + 2 * 17  # of attention, of the shared expert, and of the others


@pytest.mark.parametrize(
    ("config", "settings", "error", "message"),
    [
        ({"model_type": "nonsense"}, {}, ModelError, "nonsense"),
        ({"model_type": "t5"}, {}, ModelError, "'t5' that only decodes"),
        (GEMMA_3N, {}, ModelError, r"hidden states \[4, 1, 16, 32\]"),
        (LLAMA_2_70B | {"quantization_config": {"quant_method": "gptq"}}, {}, ModelError, "quantized"),
        (LLAMA_2_70B, {"method": "wando"}, RecipeError, "Did you mean 'wanda'"),
        (LLAMA_2_70B, {"pattern": "3:5"}, PatternError, "layers.0.self_attn.q_proj"),
        (LLAMA_2_70B, {"targets": ("x_proj",)}, ModelError, "x_proj"),
        (LLAMA_2_70B, {"max_seq_length": 5000}, CalibrationError, "4096"),
        (LLAMA_2_70B | {"num_key_value_heads": 3}, {}, ModelError, r"cannot be read \(RuntimeError"),
        (LLAMA_2_70B | {"vocab_size": 0}, {}, ModelError, "cannot be read"),
        (LLAMA_2_70B | {"intermediate_size": 10**12}, {}, ModelError, "cannot be read"),
    ],
)
def test_what_cannot_be_pruned_is_refused(tmp_path: Path, config, settings, error: type[Exception], message: str):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        inspect(tmp_path, **settings)


def test_a_place_without_a_configuration_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        inspect(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        inspect(tmp_path / "missing")


def test_a_gguf_file_is_refused_with_what_to_give_instead(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    for door in (inspect, lambda path: advise(path, bits=4.0)):
        with pytest.raises(ModelError, match=r"a GGUF file has no config\.json.*Give the model that it was made from"):
            door(tmp_path / "model.gguf")


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_run_on_a_gpu_knows_its_needs_whatever_the_model_came_from(tmp_path: Path, on_disk: bool):
    model, recipe = build_family("llama"), make_recipe()
    model.save_pretrained(tmp_path)
    if on_disk:
        model = load(tmp_path, device="cpu").model
    outline = read_outline(tmp_path, recipe)
    assert device_bytes(model, recipe) == cost.memory(outline.size, setting_of(recipe, outline)).device > 0
