"""What a loaded model was made of: all that a result depends on or holds, and nothing that only saving it changes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, CTRLTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from convexprune.adapters._checkpoints.origin import origin_of_loaded
from convexprune.errors import ModelError

VOCABULARY = ["<unk>", "a@@", "b@@", "c", "ab@@", "bc"]


def slow_tokenizer(folder: Path, *merges: str) -> PreTrainedTokenizerBase:
    vocabulary, rules = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    rules.write_text("\n".join(("#version", *merges, "")))
    return CTRLTokenizer(str(vocabulary), str(rules))


def test_a_slow_tokenizer_is_more_than_its_vocabulary(build: Callable[[str], PreTrainedModel], tmp_path: Path):
    model = build("llama")
    orders = [("a b", "b c</w>"), ("b c</w>", "a b"), ("a b", "b c</w>")]
    tokenizers = [slow_tokenizer(tmp_path, *order) for order in orders]
    assert [t.tokenize("abc") for t in tokenizers] == [["ab@@", "c"], ["a@@", "bc"], ["ab@@", "c"]]
    first, other, same = (origin_of_loaded(model, tokenizer) for tokenizer in tokenizers)
    assert first == same and first.checksums["tokenizer"] != other.checksums["tokenizer"]


def test_a_model_that_was_saved_and_read_again_is_the_same(
    build: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    model = build("llama")
    expected = origin_of_loaded(model, tokenizer)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    assert origin_of_loaded(model, tokenizer) == expected
    again = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert origin_of_loaded(*again) == expected


def test_a_tokenizer_that_cannot_be_saved_is_refused(
    tiny_llama, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda _: 1 / 0)
    with pytest.raises(ModelError, match=r"cannot be saved with the result \(ZeroDivisionError"):
        tiny_llama.origin()
