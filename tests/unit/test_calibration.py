import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from convexprune._progress import followed_by
from convexprune.adapters import HuggingFaceModel, calibration_and_held_out, text_windows
from convexprune.adapters._data.documents import read_text
from convexprune.errors import CalibrationError

STREAM = torch.arange(4000)  # every token once, so that windows which overlap would repeat one
PROSE = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n" * 40


def calibrate(dataset, model, num_samples: int | None = 4, max_seq_length: int | None = 16, seed=0, **options):
    return calibration_and_held_out(
        dataset, model, num_samples=num_samples, max_seq_length=max_seq_length, seed=seed, **options
    )[0]


# ---- windows


def test_windows_are_disjoint_pieces_of_the_stream(tiny_opt):
    windows = calibrate(STREAM, tiny_opt, num_samples=100)
    assert windows.shape == (100, 16)
    assert windows.dtype == torch.int64
    assert len(windows.unique()) == windows.numel()
    assert torch.equal(windows - windows[:, :1], torch.arange(16).expand(100, 16))
    assert not (windows[:, 0] % 16).any()


def test_the_seed_decides_which_windows(tiny_opt):
    first, again, other = (calibrate(STREAM, tiny_opt, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_two_splits_of_one_data_set_share_no_window(tiny_opt):
    calibration = calibrate(STREAM, tiny_opt, num_samples=125)
    evaluation = calibrate(STREAM, tiny_opt, num_samples=125, split="evaluation")
    assert len(torch.cat([calibration, evaluation]).unique()) == 250 * 16


def test_all_windows_are_in_order_when_all_are_wanted(tiny_opt):
    for num_samples in (250, None):
        assert torch.equal(calibrate(STREAM, tiny_opt, num_samples=num_samples).flatten(), STREAM)


def test_text_windows_are_all_there_are_in_order(tiny_opt, tmp_path):
    ids = tiny_opt.tokenizer(PROSE)["input_ids"]
    windows = text_windows(PROSE, tiny_opt, 16)
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    assert torch.equal(text_windows(path, tiny_opt, 16), windows)
    assert torch.equal(text_windows(str(path), tiny_opt, 16), windows)


def test_without_a_length_windows_are_as_long_as_the_model_sees(tiny_opt):
    assert calibrate(STREAM, tiny_opt, max_seq_length=None).shape == (4, 64)


# ---- kinds of data set


def test_the_same_text_in_any_kind_gives_the_same_windows(tiny_opt, tmp_path):
    texts = [PROSE, PROSE.upper()]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ids = torch.tensor(tiny_opt.tokenizer("\n\n".join(texts))["input_ids"])
    expected = calibrate(ids, tiny_opt)
    for dataset in (texts, tuple(texts), tmp_path / "a.txt", str(tmp_path / "a.txt"), tmp_path / "a.jsonl"):
        assert torch.equal(calibrate(dataset, tiny_opt), expected)


def test_the_same_rows_in_any_kind_give_the_same_windows(tiny_opt):
    rows = STREAM[:64].reshape(4, 16)
    dictionaries = [{"input_ids": row, "attention_mask": torch.ones(16)} for row in rows]
    kinds: list[Any] = [
        rows,
        rows.to(torch.int32),
        list(rows),
        list(rows.split(2)),
        [(row[None], row[None]) for row in rows],
        dictionaries,
        dictionaries[0] | {"input_ids": rows, "attention_mask": torch.ones(4, 16)},
        rows.numpy(),
        list(rows.numpy()),
        rows.tolist(),
        [{"input_ids": row} for row in rows.tolist()],
        {"input_ids": rows.tolist(), "attention_mask": [[1] * 16] * 4},
        DataLoader(list(rows), batch_size=3),  # pyright: ignore[reportArgumentType]
        DataLoader(TensorDataset(rows), batch_size=2),
        DataLoader(dictionaries, batch_size=2),  # pyright: ignore[reportArgumentType]
    ]
    for dataset in kinds:
        assert torch.equal(calibrate(dataset, tiny_opt), rows)
        assert torch.equal(calibrate(dataset, tiny_opt, max_seq_length=None), rows)


def test_a_loader_without_end_is_read_only_as_far_as_needed(tiny_opt):
    class Endless(IterableDataset):
        def __iter__(self):
            yield from (torch.arange(16) + count for count in range(6))
            raise AssertionError("read on, and it would never end")

    for dataset in (DataLoader(Endless(), batch_size=3), (row.tolist() for row in Endless())):
        assert calibrate(dataset, tiny_opt)[:, 0].tolist() == [0, 1, 2, 3]


# ---- what is refused


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (STREAM[:70], {}, r"holds 4 full windows of 16 tokens; 5 were asked for"),
        (STREAM[:5], {"num_samples": None}, r"holds 0 full windows of 16 tokens; 1 were asked for"),
        (torch.zeros(3, 16, dtype=torch.int64), {}, "holds 3 full windows"),
        (STREAM + 97, {}, r"Token ids from 97 to 4096; tiny-opt knows 0 to 4095"),
        (STREAM - 1, {}, "Token ids from -1 to"),
        (STREAM.float(), {}, r"Token ids are integers; got torch\.float32"),
        (STREAM, {"max_seq_length": 65}, "Windows of 65 tokens: tiny-opt can see from 1 to 64"),
        (STREAM, {"max_seq_length": 0}, "Windows of 0 tokens"),
        (STREAM, {"num_samples": 0}, "num_samples=0"),
        (STREAM.reshape(50, 80), {"max_seq_length": None}, "Windows of 80 tokens; tiny-opt sees 64"),
        (STREAM.reshape(80, 50), {}, "rows have 50 to 50 tokens; all need 16"),
        ([STREAM[:16], STREAM[:12]], {"max_seq_length": None}, "rows have 12 to 16 tokens; all need the same length"),
        ([{"input_ids": STREAM[:16], "attention_mask": STREAM[:16] > 2}], {}, "padded"),
        ([], {}, "empty"),
        ([3, 4], {}, "Token ids cannot be read from a value of type int"),
        ({"text": "no"}, {}, r"A row has \['text'\] and no input_ids"),
        ([{"text": "no"}], {}, "or texts as a list of them"),
        (None, {}, "type NoneType cannot calibrate. Accepted: \"self\""),
        ([[3, 4], [5]], {}, "rows have 1 to 2 tokens"),
        ([STREAM[:0]], {}, "empty"),
        ({"input_ids": [[3, 4], [5]], "attention_mask": [[1, 1], [1]]}, {}, "cannot be read from a value of type list"),
        ("C4", {}, "Unknown data set 'C4'. Did you mean 'c4'"),
        (PROSE, {}, r"dataset is a text of 3,400 characters, 'It is a truth .*dataset=\[text\]"),
        (PROSE.replace(" ", "-").replace("\n", "-"), {}, "dataset is a text of 3,400 characters"),
        ("wikitext", {}, "Unknown data set 'wikitext'. Did you mean 'wikitext2'"),
        ("nowhere/at/all.txt", {}, r"nowhere/at/all\.txt: cannot be read"),
        ("self", {"num_samples": None}, "say how many samples"),
        ("self", {"max_seq_length": 1}, "needs 2 or more"),
    ],
)  # fmt: skip
def test_a_data_set_that_cannot_calibrate_is_refused(tiny_opt, dataset, options, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(dataset, tiny_opt, **({"num_samples": 5} | options))


@pytest.mark.parametrize("name", ["ok.csv", "ok.json", "ok.md", "texts"])
@pytest.mark.parametrize("kind", [str, Path])
def test_what_exists_is_never_taken_for_a_name_on_the_hub(tiny_opt, tmp_path, monkeypatch, name, kind):
    (tmp_path / "t" / "texts").mkdir(parents=True)
    if name != "texts":
        (tmp_path / "t" / name).write_text(PROSE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=rf"t/{name} exists; files of text end in \.txt or \.jsonl"):
        calibrate(kind(f"t/{name}"), tiny_opt)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON .*Mend or remove it"),
        ('{"text": "a", "id": ' + "1" * 5000 + "}", "line 2: not JSON .*5000 digits.*Mend or remove it"),
        ("[" * 200_000, "line 2: not JSON .*recursion.*Mend or remove it"),
        ('{"text": "cut \\ud83d here"}', r"half of a character, '.ud83d'.*'one.*cut .ud83d here'. Remove it"),
        ('{"words": "a"}', """line 2: needs an object with a field "text" .*the fields 'words'. Write every"""),
        ("[]", "line 2: .* it has a value of type list"),
    ],
)
def test_a_bad_line_is_named(tiny_opt, tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(CalibrationError, match=message):
        calibrate(path, tiny_opt)


def test_text_needs_a_tokenizer(build):
    with pytest.raises(CalibrationError, match="came without a tokenizer"):
        calibrate([PROSE], HuggingFaceModel(build("opt")))


def test_a_text_is_a_phase_of_its_own(tiny_opt):
    heard = []
    with followed_by(lambda event: heard.append(event.phase)):
        text_windows(PROSE, tiny_opt, 16)
    assert heard == [f"reading {len(PROSE):,} characters of text"]


def test_a_long_text_is_no_reason_for_a_warning(tiny_opt, monkeypatch):
    said = []
    monkeypatch.setattr(logging.Logger, "handle", lambda _, record: said.append(record.getMessage()))
    monkeypatch.setattr(tiny_opt.tokenizer, "model_max_length", 64)
    tiny_opt.tokenizer(PROSE)
    assert "longer than" in said.pop()
    tiny_opt.tokenizer.deprecation_warnings.clear()
    calibrate([PROSE], tiny_opt)
    assert said == []


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (gzip.compress(b"a text", mtime=0), "It is compressed. Unpack it: gunzip"),
        ("a text".encode("utf-32"), "It is UTF-32. Convert it: iconv -f UTF-32 -t UTF-8"),
        ("a text".encode("utf-16"), "It is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8"),
        ("façade".encode("latin-1"), "If it is Latin-1: iconv -f LATIN1 -t UTF-8."),
    ],
)
def test_bytes_that_are_no_utf_8_are_refused_with_what_to_do(tmp_path: Path, content: bytes, advice: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CalibrationError, match=re.escape(advice)):
        read_text(tmp_path / "a.txt")


def test_a_field_of_text_that_holds_no_text_is_named_with_what_it_holds(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": 3}')
    with pytest.raises(CalibrationError, match="it has the fields 'id', 'text', and int in that one"):
        read_text(tmp_path / "a.jsonl")
