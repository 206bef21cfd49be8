"""`evaluate`: its numbers are those of a plain loop over transformers, and say by which convention they are."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from door import SMALL, TOKENS
from test_cli import folder, run
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import convexprune
from convexprune import errors
from convexprune.validation import _evaluate as module
from convexprune.validation import _texts

__all__ = ["folder"]  # a fixture of test_cli

TEXT = "It was the best of times, it was the worst of times, naïve and “odd”. " * 40


@pytest.fixture
def pair(folder: Path) -> tuple[Path, Path, Path]:
    """A dense model, one that is not, and a text."""
    (folder / "text.txt").write_text(TEXT)
    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for layer in other.model.decoder.layers:
            layer.fc1.weight.mul_(layer.fc1.weight.abs() > 0.02)
    other.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "other")
    return folder / "model", folder / "other", folder / "text.txt"


def plain_loop(model: Path, text: str, window: int) -> tuple[Tensor, Tensor, str]:
    """As wanda's and SparseGPT's code goes: log probabilities, the labels, and the text of the windows."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, return_tensors="pt").input_ids
    rows = [ids[:, i * window : (i + 1) * window] for i in range(ids.numel() // window)]
    with torch.no_grad():
        logits = torch.cat([network(row).logits[:, :-1] for row in rows])
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    read = tokenizer.decode(torch.cat(rows).flatten().tolist(), **plain)
    return logits.double().log_softmax(-1), torch.cat(rows)[:, 1:], read


def test_every_number_is_that_of_a_plain_loop(pair: tuple[Path, Path, Path]):
    dense, other, text = pair
    p, labels, _ = plain_loop(dense, TEXT, 64)
    q, _, read = plain_loop(other, TEXT, 64)
    (score,) = convexprune.evaluate(other, against=dense, text=[text]).texts
    nll, of_dense = (-x.gather(-1, labels[..., None]).mean().item() for x in (q, p))
    assert score.convention == "common, native" and score.perplexity.windows == len(labels) > 5
    assert score.perplexity.nll == pytest.approx(nll, rel=1e-6)
    assert score.dense is not None and score.dense.value == pytest.approx(math.exp(of_dense), rel=1e-5)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert score.kl == pytest.approx(expected, abs=1e-6) and expected > 1e-4  # ours is in float32
    bits = nll / math.log(2) * len(labels) * 64 / len(read.encode())
    assert score.bits_per_byte == pytest.approx(bits, rel=1e-6)
    (alone,) = convexprune.evaluate(dense, against=dense, text=[text], max_windows=2).texts
    assert alone.kl == pytest.approx(0, abs=1e-6) and alone.perplexity.windows == 2


def test_a_loaded_model_is_measured_as_its_folder_and_left_as_it_was(pair: tuple[Path, Path, Path]):
    dense, other, text = pair
    (expected,) = convexprune.evaluate(other, against=dense, text=text, window=32).texts
    first, second = (AutoModelForCausalLM.from_pretrained(place).train() for place in (other, dense))
    first.model.decoder.layers[0].eval()
    first.lm_head.requires_grad_(False)
    before = [_state(model) for model in (first, second)]
    for words in (dense, AutoTokenizer.from_pretrained(dense)):
        assert convexprune.evaluate(first, against=second, text=text, window=32, tokenizer=words).texts == (expected,)
    assert convexprune.evaluate(other, against=second, text=text, window=32).texts == (expected,)
    with pytest.raises(errors.CalibrationError, match=r"came without a tokenizer.* Give tokenizer="):
        convexprune.evaluate(first, against=second, text=text)
    for given in ({"model": first}, {"model": dense, "against": second}):
        with pytest.raises(errors.RecipeError, match="dtype='bfloat16': a loaded model keeps its own"):
            convexprune.evaluate(**given, text=text, dtype="bfloat16", tokenizer=dense)
    assert [_state(model) for model in (first, second)] == before


def _state(model: Any) -> list[Any]:
    return [*(each.training for each in model.modules()), *((p.requires_grad, p.dtype) for p in model.parameters())]


def test_the_common_window_and_the_models_own_are_both_measured(pair: tuple[Path, Path, Path], monkeypatch):
    dense, _, text = pair
    monkeypatch.setattr(module, "COMMON", 16)
    found = convexprune.evaluate(dense, text=text)
    assert [(s.convention, s.perplexity.window) for s in found.texts] == [("common", 16), ("native", 64)]
    text.write_text("It was the best of times, it was the worst of times. " * 2)
    found = convexprune.evaluate(dense, text=text)
    assert [s.convention for s in found.texts] == ["common"] and "native windows of 64 tokens" in found.left_out[0]
    assert "not measured: " in run("eval", dense, "--text", text).output
    text.write_text(TEXT)
    monkeypatch.setattr(module, "LONGEST", 32)
    found = convexprune.evaluate(dense, text=text)
    assert found.left_out == (f"{text} by native windows of 64 tokens: ask for it with window=64.",)


def test_the_command_prints_json(pair: tuple[Path, Path, Path]):
    dense, other, text = pair
    done = run("eval", other, "--against", dense, "--text", text, "--window", 32, "--json", "--quiet")
    (score,) = json.loads(done.stdout)["texts"]
    assert score["convention"] == "given" and score["perplexity"]["window"] == 32 and score["kl"] > 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, errors.RecipeError, "Nothing to evaluate on. Give a text"),
        ({"text": ["wikitext"]}, errors.CalibrationError, "Unknown text 'wikitext'. Did you mean 'wikitext2'?"),
        ({"text": ["no.txt"]}, errors.CalibrationError, "no.txt"),
        ({"text": ["licences"], "window": 100}, errors.CalibrationError, "can see 64 tokens at most"),
        ({"text": ["licences"], "tasks": ["a"]}, errors.DependencyError, "Tasks need lm-eval: pip install"),
        ({"text": ["licences"], "limit": 3}, errors.RecipeError, "limit is of tasks, and no task is named. Name some"),
        ({"txt": ["licences"]}, errors.RecipeError, "Unknown setting 'txt'. Did you mean 'text'?"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder: Path, monkeypatch, given: Any, error: type[Exception], words: str):
    monkeypatch.setattr(_texts, "find_spec", lambda _: None)
    with pytest.raises(error) as refused:
        convexprune.evaluate(folder / "model", **given)
    assert words in str(refused.value)


def test_models_that_do_not_predict_the_same_tokens_are_refused(pair: tuple[Path, Path, Path]):
    dense, other, text = pair
    smaller = AutoModelForCausalLM.from_pretrained(dense)
    smaller.resize_token_embeddings(4000)
    smaller.save_pretrained(other)
    with pytest.raises(errors.ModelError, match="Give the dense model that this one was made of"):
        convexprune.evaluate(other, against=dense, text=text)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_tokens(["brown"])
    tokenizer.save_pretrained(dense)
    with pytest.raises(errors.ModelError, match="or they read text in different ways"):
        convexprune.evaluate(None, against=dense, text=text)


# ---- prune


def test_held_out_samples_are_evaluated_before_and_after(build):
    given: dict[str, Any] = SMALL | {"method": "magnitude", "num_calibration_samples": 4, "evaluation": "held-out"}
    loaded, dense = build("llama"), build("llama")
    found = convexprune.prune(loaded, **given).report.perplexity
    with torch.no_grad():
        p, q = (model.eval()(TOKENS).logits[:, :-1].double().log_softmax(-1) for model in (dense, loaded))
    kl = (p.exp() * (p - q)).sum(-1).mean(-1)
    assert found["dense"]["windows"] == 1 and "kl" not in found["dense"]
    assert any(math.isclose(found["pruned"]["kl"], each, rel_tol=1e-3) for each in kl.tolist())
    with pytest.raises(errors.CalibrationError, match=r"no sample is held out.*\(--evaluation FILE\)\."):
        convexprune.prune(build("llama"), **given, held_out_samples=0)


def test_the_command_evaluates_on_what_is_held_out(folder: Path):
    options = [
        "--method",
        "magnitude",
        "--nsamples",
        8,
        "--seqlen",
        32,
        "--output",
        folder / "out",
        "--evaluation",
        "held-out",
    ]
    done = run("prune", folder / "model", "--dataset", folder / "text.txt", "--output", folder / "out", *options)
    words = " ".join(done.stdout.split())
    assert "tokens of the held-out samples" in words and "nats a token on the same text" in words, done.output


def test_of_chats_the_answers_alone_count(pair: tuple[Path, Path, Path]):
    dense, other, text = pair
    template = "{% if not messages %}{{ raise_exception('none') }}{% endif %}"
    template += "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    for place in (dense, other):
        tokenizer = AutoTokenizer.from_pretrained(place)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(place)
    chats = [("What is a whale?", "A great beast."), ("And a ship?", "A house that swims on the wide sea.")]
    roles = ("user", "assistant")
    opening = [{"role": "assistant", "content": " Ask me."}]
    written = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, chat, strict=True)]} for chat in chats]
    path = text.with_name("chat.jsonl")
    path.write_text("\n".join(map(json.dumps, written)))
    (score,) = convexprune.evaluate(other, against=dense, text=[path]).texts
    losses, distances = list[Tensor](), list[Tensor]()
    networks = [AutoModelForCausalLM.from_pretrained(place) for place in (other, dense)]
    for question, answer in chats:
        asked = f"<user>{question}\n<assistant>"
        read = tokenizer(f"{asked}{answer}\n", add_special_tokens=False, return_offsets_mapping=True)
        first = sum(begin < len(asked) for begin, _ in read.offset_mapping)
        ids = torch.tensor([read.input_ids])
        with torch.no_grad():
            q, p = (each(ids).logits[0, :-1].double().log_softmax(-1)[first - 1 :] for each in networks)
        losses.append(-q.gather(1, ids[0, first:, None]))
        distances.append((p.exp() * (p - q)).sum(1))
    assert score.convention == "answers" and score.perplexity.tokens == sum(map(len, losses))
    assert score.perplexity.nll == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert score.kl == pytest.approx(torch.cat(distances).mean().item(), abs=1e-6)  # of float32 logits
    with pytest.raises(errors.CalibrationError, match="assistant's message in its first 2 tokens"):
        convexprune.evaluate(other, text=[path], window=2)
    path.write_text("\n".join(json.dumps({"turns": each["messages"]}) for each in written))
    assert convexprune.evaluate(other, text=[f"{path}#turns"]).texts[0].perplexity == score.perplexity
    path.write_text(json.dumps({"messages": opening + written[0]["messages"]}))  # some templates refuse no messages
    (first,) = convexprune.evaluate(other, text=[path]).texts
    said = tokenizer("Ask me.\n", add_special_tokens=False).input_ids, tokenizer(f"{chats[0][1]}\n").input_ids
    assert abs(first.perplexity.tokens - sum(map(len, said))) <= 2  # tokens may begin before
    path.write_text(json.dumps({"messages": written[0]["messages"][:1]}))
    with pytest.raises(errors.CalibrationError, match="no chat has an assistant's message"):
        convexprune.evaluate(other, text=[path])
