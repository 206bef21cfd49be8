"""Calibration by conversations: what the model reads is what its chat template makes of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import convexprune
from convexprune.adapters import HuggingFaceModel, calibration_and_held_out, check_dataset
from convexprune.adapters._data.documents import read_documents, read_text
from convexprune.errors import CalibrationError
from convexprune.validation import verify

TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"
CHATS = [
    [
        {"role": "user", "content": f"What is {i} and {i}, if you please?"},
        {"role": "assistant", "content": f"It is {2 * i}."},
    ]
    for i in range(60)
]
ALL: dict[str, Any] = {"num_samples": None, "max_seq_length": 16, "seed": 0}


@pytest.fixture
def chat(tiny_llama: HuggingFaceModel) -> Iterator[HuggingFaceModel]:
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.chat_template = TEMPLATE
    yield tiny_llama
    tiny_llama.tokenizer.chat_template = None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (path := tmp_path / "chat.jsonl").write_text(
        "\n".join(json.dumps({"id": 1, "messages": c, "old": c}) for c in CHATS)
    )
    return path


def test_messages_go_through_the_chat_template(chat: HuggingFaceModel, file: Path):
    assert chat.tokenizer is not None
    text = "".join(f"<{message['role']}>{message['content']}\n" for conversation in CHATS for message in conversation)
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    (marked := file.with_name("marked.jsonl")).write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Windows writes
    for dataset in (str(file), file, f"{file}#old", marked, [{"messages": conversation} for conversation in CHATS]):
        windows = calibration_and_held_out(dataset, chat, **ALL)[0]
        assert windows.flatten().tolist() == ids[: windows.numel()] and len(ids) - windows.numel() < 16


def test_without_a_template_they_are_refused_with_what_to_do(
    tiny_llama: HuggingFaceModel, chat: HuggingFaceModel, file: Path
):
    assert tiny_llama.tokenizer is not None
    with pytest.raises(CalibrationError, match="is no list of messages with role and content"):
        calibration_and_held_out([{"messages": [{"role": "user"}]}] * 60, chat, **ALL)
    for template, message in (
        (None, "no chat template"),
        (REFUSING, r"refuses the conversation .*roles must alternate"),
    ):
        tiny_llama.tokenizer.chat_template = template
        with pytest.raises(CalibrationError, match=message):
            calibration_and_held_out(file, tiny_llama, **ALL)[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user"}]}', 'field "messages" that holds text, or messages with role and content'),
        ('{"messages": []}', "and list in that one"),
        ('{"text": "a text"}', "some lines hold text and some conversations"),
        ('{"prompt": "a text"}', r"name another field: /.*chat.jsonl#FIELD"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(file: Path, line: str, message: str):
    file.write_text(f"{file.read_text()}\n{line}")
    for read in (read_documents, check_dataset, lambda path: convexprune.evaluate("no/model", text=[path])):
        with pytest.raises(CalibrationError, match=message):  # before any model is opened
            read(file)


def test_another_field_may_be_named(tmp_path: Path):
    (path := tmp_path / "a.jsonl").write_text('{"text": "no", "prompt": "one"}\n{"text": "no", "prompt": "two"}')
    assert read_documents(f"{path}#prompt").rows == ["one", "two"] and read_text(path) == "no\n\nno"
    check_dataset(f"{path}#prompt,self")


def test_a_run_on_a_named_field_is_verified(chat: HuggingFaceModel, file: Path, tmp_path: Path):
    chat.model.save_pretrained(tmp_path / "model")
    assert chat.tokenizer is not None
    chat.tokenizer.save_pretrained(tmp_path / "model")
    run: dict[str, Any] = {
        "dataset": f"{file}#old",
        "num_calibration_samples": 4,
        "max_seq_length": 16,
        "method": "magnitude",
    }
    report = convexprune.prune(tmp_path / "model", output_dir=tmp_path / "out", **run).report
    assert report.recipe["dataset"] == f"{file}#old"
    assert verify(tmp_path / "out", rows=1, columns=4, sample=1, bound_rows=1).errors
