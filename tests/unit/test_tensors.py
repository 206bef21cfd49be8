"""Tensors on disk come back as they were, to us and to safetensors; a damaged file is named."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from convexprune._storage.batches import Batches
from convexprune._storage.tensors import DTYPES, Spec, entries, write_tensors
from convexprune.errors import ModelError

TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=8),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**31)),
    max_size=6,
)


def _tensor(code: str, shape: list[int], seed: int) -> Tensor:
    raw = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    return raw.to(DTYPES[code])


@given(TENSORS)
def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    tensors = {name: _tensor(*how) for name, how in recipe.items()}
    write_tensors(path, {n: Spec.of(t) for n, t in tensors.items()}, tensors.__getitem__, {"format": "pt"})
    for found in (load_file(path), {n: e.read() for n, e in entries(path)[0].items()}):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == entries(path)[1] == {"format": "pt"}


@given(TENSORS)
def test_what_safetensors_writes_is_read(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    tensors = {name: _tensor(*how) for name, how in recipe.items()}
    save_file(tensors, path)
    found = {n: e.read() for n, e in entries(path)[0].items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("length", [0, 4, 9, 60, -1])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, length: int):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4, 4)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"x\.safetensors: damaged or cut short"):
        entries(path)


def test_a_file_that_is_cut_short_later_is_named(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4, 4)}, path)
    entry = entries(path)[0]["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="damaged or cut short"):
        entry.read()


@given(st.sampled_from(["F32", "BF16", "F16"]), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_batches_come_back_as_they_were(tmp_path_factory, code: str, sizes: list[int]):
    batches = Batches(tmp_path_factory.mktemp("batches") / "x.bin")
    given = [torch.randn(size, 3, 5).to(DTYPES[code]) for size in sizes]
    for batch in given:
        batches.append(batch)
    again = Batches(batches.path, batches.dtype, json.loads(json.dumps(batches.shapes)))
    for found in (list(batches), list(again), list(again[:]), [again[-1 - i] for i in range(len(again))][::-1]):
        assert len(found) == len(given) and all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    assert again.nbytes == batches.path.stat().st_size
    with pytest.raises(IndexError):
        again[len(again)]


def test_batches_may_begin_anywhere_in_a_page(tmp_path: Path):
    batches = Batches(tmp_path / "x.bin")
    given = [torch.randn(3, size).bfloat16() for size in (1001, 4099, 5, 2047)]
    for batch in given:
        batches.append(batch)
    assert all(torch.equal(a, b) for a, b in zip(batches, given, strict=True))


def test_a_hint_about_a_file_that_is_gone_is_no_error(tmp_path: Path):
    Batches(tmp_path / "gone.bin").prefetch()
