"""Our reader of safetensors headers refuses whatever the library refuses."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from convexprune._storage.tensors import BITS, entries
from convexprune.errors import ModelError

COUNTS = st.integers(-2, 9) | st.sampled_from([True, 2.0, "4", None, 1 << 63, 1 << 64, -0.0, [1], {}])
SHAPES = st.lists(COUNTS, max_size=3) | st.sampled_from(["", "12", None, 4, {"0": 1}])
SPANS = st.lists(COUNTS, min_size=1, max_size=3) | st.sampled_from(["", "ab", None, {"0": 1, "1": 2}])
PARTS = {
    "dtype": st.sampled_from([*BITS, "f32", "X", "", 7, None, {"U8": None}]), "shape": SHAPES, "data_offsets": SPANS,
    "more": st.just([[[0]]]),
}  # fmt: skip
METADATA = st.sampled_from([{}, {"a": "b"}, {"a": 1}, {"a": None}, {"\ud800": "b"}, [], None, "a", 1])


@st.composite
def _right(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that is right, and how many bytes it tells of."""
    header, end = {}, 0
    for name in draw(st.lists(st.text("ab", min_size=1, max_size=2), unique=True, max_size=4)):
        code, shape = (
            draw(st.sampled_from(sorted(c for c in BITS if BITS[c] % 8 == 0))),
            draw(st.lists(st.integers(0, 3), max_size=2)),
        )
        begin, end = end, end + torch.Size([*shape, BITS[code]]).numel() // 8
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    return header, end


@st.composite
def _mutated(draw: st.DrawFn) -> tuple[bytes, int]:
    """The bytes of a header with something wrong, more often than not, and how many bytes follow it."""
    header, length = draw(_right())
    for name in draw(st.lists(st.sampled_from(sorted(header)), max_size=2, unique=True)) if header else ():
        part = draw(st.sampled_from(sorted(PARTS)))
        header[name] = draw(st.sampled_from([{**header[name], part: draw(PARTS[part])}] * 9 + [[1, 2]]))
    if draw(st.booleans()):
        header["__metadata__"] = draw(METADATA)
    text = json.dumps(header)
    for _ in range(draw(st.integers(0, 2))):
        begin = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from(["", " ", "-", "0", "1e3", "NaN", ",", "\\ud800", "\x00", "é", "[" * 200, '"a":']))
        text = text[:begin] + piece + text[draw(st.integers(begin, min(begin + 3, len(text)))) :]
    return text.encode(errors="surrogatepass"), max(0, length + draw(st.sampled_from([0, 0, 0, 1, -1])))


def _file(folder: Path, header: bytes, length: int, told: int | None = None) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if told is None else told) + header + bytes(length))
    return path


def _ours(path: Path) -> set[str] | None:
    try:
        return set(entries(path)[0])
    except ModelError:
        return None


def _library(path: Path) -> set[str] | None:
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except SafetensorError:
        return None


ONE = '{"a":{"dtype":"U8","shape":%s,"data_offsets":%s}}'


@settings(max_examples=200)
@given(_mutated())
@example(((ONE % ([8], [0, 8])).encode(), 8))
@example(((ONE % ('""', [0, 1])).encode(), 1))
@example(((ONE % ("[0,18446744073709551615]", [0, 0])).encode(), 0))
@example(((ONE % ("[9223372036854775807,9223372036854775807,0]", [0, 0])).encode(), 0))
@example(((ONE % ([8], [0, 8])).encode("utf-16"), 8))
@example((b"\xef\xbb\xbf" + (ONE % ([8], [0, 8])).encode(), 8))
@example((b"[" * 100_000, 0))
def test_what_the_library_refuses_is_refused(tmp_path_factory: pytest.TempPathFactory, header: tuple[bytes, int]):
    path = _file(tmp_path_factory.mktemp("headers"), *header)
    found = _ours(path)
    assert found is None or found == _library(path)


@given(_right())
def test_what_is_right_is_accepted(tmp_path_factory: pytest.TempPathFactory, header: tuple[dict[str, Any], int]):
    path = _file(tmp_path_factory.mktemp("headers"), json.dumps(header[0]).encode(), header[1])
    assert _ours(path) == _library(path) == set(header[0])


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}', 6,
         "b begins at byte 2, what is before it ends at 4"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[-4,0]}}', 0, "-4 is no number of bytes"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}}', 5, "a begins at byte 1"),
        ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', 4, "a: 4 bytes for F32"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{}}', 4, "a name that comes twice"),
    ],
)  # fmt: skip
def test_a_header_that_is_wrong_is_told_what_is(tmp_path: Path, header: str, length: int, message: str):
    with pytest.raises(ModelError, match=message):
        entries(_file(tmp_path, header.encode(), length))


def test_a_header_that_is_too_long_is_refused_without_reading_it(tmp_path: Path):
    path = _file(tmp_path, b"{}", 0, told=100_000_001)
    os.truncate(path, 200_000_000)
    assert _library(path) is None and _ours(path) is None


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors is no ordinary file"):
        entries(tmp_path / "x.safetensors")
