"""What `prune` and `permute` refuse before any work: arguments of another kind, and models that do not decode text."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from door import SMALL, TOKENS
from tiny_families import _COMMON, POSITIONS, VOCABULARY, build_family

import convexprune
from convexprune import errors
from convexprune.adapters import EMBEDDED, HuggingFaceModel
from convexprune.adapters._inspection.inspection import inspect
from convexprune.solvers._fista import FISTA


class OnlySolves:
    def solve(self, problem: Any, start: Any = None) -> None: ...


ARGUMENTS = {
    "a solver that is none": (
        {"solver": OnlySolves()},
        "solver is a value of type OnlySolves. Accepted: admm, .*AbstractSolver",
    ),
    "a class of a solver": ({"solver": FISTA}, "solver is the class FISTA"),
    "on_progress": ({"on_progress": 5}, "on_progress=5: Input should be callable"),
    "a folder without a name": ({"output_dir": ""}, "output_dir is an empty text"),
    "resume without a folder": ({"resume": True}, "Give output_dir"),
    "a number for a tokenizer": ({"tokenizer": 5}, "A value of type int is no tokenizer"),
    "a folder without a tokenizer": ({"tokenizer": Path(__file__).parent}, "holds no tokenizer"),
    "a text to evaluate on": (
        {"evaluation": "It was. " * 9999},
        r"'It was\. .*\.\.\. \(79,994 characters\): files of text",
    ),
    "a number to evaluate on": ({"evaluation": 5}, "evaluation is of type int. Accepted: 'held-out', 'self'"),
    "an empty data set": ({"dataset": ""}, "'' names no text. Give a file that ends in .txt or .jsonl"),
    "no data set": ({"dataset": None}, "type NoneType cannot calibrate"),
    "a text for a data set": (
        {"dataset": "It was. " * 9999},
        r"dataset is a text of 79,992 characters.*dataset=\[text\]",
    ),
    "a number for a model": ({"model": 5}, "A value of type int is no model of transformers"),
    "a long name": ({"method": "x" * 100_000}, r"Unknown method 'x{59}\.\.\. \(100,002 characters\)\."),
    "a long setting": ({"sparsity": [0.5] * 10_000}, r"sparsity=\[0.5, .*\.\.\. \([\d,]+ characters\)"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_of_another_kind_are_refused(case: str):
    settings, message = ARGUMENTS[case]
    with pytest.raises(errors.ConvexpruneError, match=message) as caught:
        convexprune.prune(**({"model": EMBEDDED} | SMALL | settings))
    assert len(str(caught.value)) < 400


WINDOWS = TOKENS % VOCABULARY
UNREADABLE = {
    "an unknown token": (WINDOWS + VOCABULARY, "knows 0 to 127"),
    "a token below zero": (WINDOWS - VOCABULARY, "Token ids from -12"),
    "numbers": (WINDOWS.float(), "Token ids are integers"),
    "too long": (WINDOWS.repeat(1, 4), f"Windows of 96 tokens; .* sees {POSITIONS} at most"),
    "no window": (WINDOWS[:0], r"windows of 2 or more tokens.*got \[0, 24\]"),
    "no token to predict": (WINDOWS[:, :1], r"got \[6, 1\]"),
    "a line of tokens": (WINDOWS[0], r"got \[24\]"),
    "batches": (WINDOWS[None], r"got \[1, 6, 24\]"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_windows_that_the_model_cannot_read_are_refused_before_any_layer(case: str, tmp_path: Path):
    windows, message = UNREADABLE[case]
    build_family("llama").save_pretrained(tmp_path / "model")
    phases = set[str]()
    settings = SMALL | {"dataset": WINDOWS, "on_progress": lambda event: phases.add(event.phase)}
    for source, output in ((build_family("llama"), None), (tmp_path / "model", tmp_path / "out")):
        with pytest.raises(errors.CalibrationError, match=message):
            convexprune.prune(source, output_dir=output, evaluation=windows, **settings)
    assert not {"pruning", "perplexity"} & phases and "loading the model" in phases


def test_windows_to_evaluate_on_may_be_integers_of_any_size(tmp_path: Path):
    build_family("llama").save_pretrained(tmp_path / "model")
    settings = SMALL | {"dataset": WINDOWS, "method": "magnitude"}
    found = [
        convexprune.prune(tmp_path / "model", output_dir=tmp_path / name, evaluation=windows, **settings).report
        for name, windows in (("int", WINDOWS.int()), ("long", WINDOWS))
    ]
    assert found[0].perplexity == found[1].perplexity


@pytest.mark.parametrize("settings", [{"on_progress": 5}, {"output_dir": " "}, {"tokenizer": 5}, {"model": 5}])
def test_permute_refuses_them_too(settings: dict[str, Any]):
    with pytest.raises(errors.ConvexpruneError, match=r"is of type int|is no |is an empty text|be callable"):
        convexprune.permute(**({"model": EMBEDDED, "dataset": TOKENS} | settings))


def test_a_tokenizer_may_be_a_folder(build, tmp_path: Path):
    text = "It is a truth universally acknowledged. " * 40
    settings: dict[str, Any] = {"dataset": [text], "num_calibration_samples": 4, "max_seq_length": 16}
    for place in (None, tmp_path / "out"):
        result = convexprune.prune(build("opt"), method="wanda", tokenizer=EMBEDDED, output_dir=place, **settings)
        assert result.tokenizer is not None
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    convexprune.permute(build("llama"), tokenizer=str(EMBEDDED), **settings)


def test_what_comes_back_is_told_in_a_line(tiny_llama: HuggingFaceModel):
    result = convexprune.prune(tiny_llama.model, method="wanda", **SMALL)
    model = "LlamaForCausalLM given by the caller"
    assert repr(result) == f"PruneResult(Report(wanda on {model}: 50.00% zeros in 14 operators), in memory)"
    permuted = convexprune.permute(tiny_llama.model, dataset=TOKENS, num_calibration_samples=4)
    assert repr(permuted) == "PermuteResult(Permutation(for 2:4: 7 sets of channels; 0 left), in memory)"


# ---- models


def bert(kind: Any, **more: Any) -> Any:
    settings = {name: value for name, value in _COMMON.items() if name != "tie_word_embeddings"}
    return kind(t.BertConfig(**settings, **more)).eval()


ENCODERS = {
    "BertModel": lambda: bert(t.BertModel),
    "BertForMaskedLM": lambda: bert(t.BertForMaskedLM),
    "BertLMHeadModel": lambda: bert(t.BertLMHeadModel),
    "RobertaForMaskedLM": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**_COMMON)),
    "ModernBertForMaskedLM": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**_COMMON)),
    "T5EncoderModel": lambda: t.T5EncoderModel(
        t.T5Config(vocab_size=128, d_model=32, d_ff=48, num_layers=2, num_heads=4)
    ),
    "Gemma3TextModel": lambda: t.Gemma3TextModel(
        t.Gemma3TextConfig(**_COMMON | {"num_key_value_heads": 2, "head_dim": 8, "use_bidirectional_attention": True})
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("door", [convexprune.prune, convexprune.permute])
def test_encoders_are_refused_by_every_door(door: Any, name: str):
    with pytest.raises(errors.ModelError, match=f"{name} is an encoder"):
        door(ENCODERS[name](), dataset=TOKENS % 128, num_calibration_samples=4)


def test_encoders_in_a_folder_are_refused(tmp_path: Path, refused):
    bert(t.BertForMaskedLM).save_pretrained(tmp_path / "bert")
    settings: dict[str, Any] = {"dataset": TOKENS % 128, "num_calibration_samples": 4}
    with refused("BERT and other encoders", "is an encoder"):
        convexprune.prune(tmp_path / "bert", **settings)
    with pytest.raises(errors.ModelError, match="is an encoder"):
        convexprune.prune(tmp_path / "bert", output_dir=tmp_path / "out", **settings)
    with pytest.raises(errors.ModelError, match="is an encoder"):
        inspect(tmp_path / "bert")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_an_encoder_beside_the_decoder_is_refused_and_that_of_the_decoder_is_not(tmp_path: Path):
    sizes: dict[str, Any] = {
        f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 48))
    }
    config = t.BartConfig(vocab_size=128, d_model=32, max_position_embeddings=64, **sizes)
    t.BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    t.BartForCausalLM(config).save_pretrained(tmp_path / "decoder")
    settings: dict[str, Any] = SMALL | {"dataset": TOKENS % 128, "method": "wanda"}
    doors = (partial(convexprune.prune, **settings), inspect, partial(convexprune.advise, bits=4.0))
    for door in doors:
        with pytest.raises(
            errors.ModelError, match=r"'bart' that only decodes.* Encoders, and encoders with a decoder"
        ):
            door(tmp_path / "bart")
        assert door(tmp_path / "decoder")


def test_a_decoder_of_such_a_family_is_pruned():
    settings = SMALL | {"dataset": TOKENS % 128, "method": "wanda"}
    assert convexprune.prune(bert(t.BertLMHeadModel, is_decoder=True), **settings).report.sparsity == 0.5


def test_a_layer_that_runs_twice_is_refused(build, refused):
    model = build("llama")
    model.model.layers[1] = model.model.layers[0]
    with refused("a decoder layer that runs twice", r"model\.layers\.0 and model\.layers\.1 are one module"):
        convexprune.prune(model, **SMALL)


@pytest.mark.parametrize("kind", [t.LlamaModel, t.LlamaForSequenceClassification])
def test_a_model_without_a_head_is_pruned_where_no_logits_are_needed(kind: Any):
    def model() -> Any:
        return kind(build_family("llama").config).eval()

    tokens: dict[str, Any] = SMALL | {"dataset": TOKENS % 128}
    cases: list[dict[str, Any]] = [{}, {"allocation": "uniform", "evaluation": TOKENS % 128}, {"dataset": "self"}]
    for settings in cases:
        with pytest.raises(errors.ModelError, match=f"^{kind.__name__} has no head"):
            convexprune.prune(model(), **tokens | settings)
    assert convexprune.prune(model(), allocation="uniform", **tokens).report.sparsity == 0.5
    with pytest.raises(errors.ModelError, match="and permute needs them"):
        convexprune.permute(model(), dataset=TOKENS % 128, num_calibration_samples=4)


def test_a_repeated_layer_given_as_copies_is_pruned_apart(build):
    import copy

    model = build("llama")
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    convexprune.prune(model, method="wanda", **SMALL)
    first, second = (layer.mlp.down_proj.weight for layer in model.model.layers)
    assert not torch.equal(first, second)
