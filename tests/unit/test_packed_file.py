"""A packed file is smaller, and comes back bit for bit: blocks, tensors, headers."""

import filecmp
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from convexprune._container import file as packing
from convexprune._container.file import contents, pack_file, packed_checksum, unpack_file
from convexprune._container.format import decode, encode, longest, width
from convexprune._storage.files import sha256
from convexprune._storage.tensors import BITS, Spec, entries, write_tensors

CODES = st.sampled_from(sorted(BITS))
# Zeros, negative zeros, quiet and signalling NaNs, infinities, denormals and all else, in any type.
PIECES = st.sampled_from([b"\0" * 16, b"\0\x80", b"\xff\xff", b"\x01\x7f", b"\x80\x7f", b"\x01\0\0\0", b"\x20\x3c"])


@st.composite
def _blocks(draw: st.DrawFn) -> tuple[str, bytes]:
    """A type, and bytes of whole entries of it."""
    code = draw(CODES)
    data = b"".join(draw(st.lists(PIECES | st.binary(max_size=64), max_size=20))) * draw(st.sampled_from([1, 1, 50]))
    return code, data[: len(data) - len(data) % width(BITS[code])]


@given(_blocks())
def test_a_block_comes_back_bit_for_bit(block: tuple[str, bytes]):
    code, data = block
    coded = encode(data, code, width(BITS[code]))
    assert decode(coded, len(data), code, width(BITS[code])) == data
    assert len(coded) <= longest(len(data))


@given(_blocks(), st.data())
def test_a_block_that_was_changed_is_refused_or_has_the_size_that_it_should_have(block: tuple[str, bytes], data):
    code, content = block
    coded = bytearray(encode(content, code, width(BITS[code])))
    begin = data.draw(st.integers(0, len(coded)))
    coded[begin : begin + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        found = decode(coded, len(content), code, width(BITS[code]))
    except ValueError:
        return
    assert len(found) == len(content)


def normal(count: int, dtype: torch.dtype, zeros: float) -> torch.Tensor:
    """Normal weights, the smallest share of them zero."""
    w = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.where(w.abs() <= w.float().abs().quantile(zeros).to(dtype), torch.zeros_like(w), w) if zeros else w


@pytest.mark.parametrize(("zeros", "bits"), [(0.0, 10.7), (0.5, 5.65), (0.6, 4.6), (0.7, 3.6), (0.8, 2.5)])
def test_zeros_make_bfloat16_as_small_as_the_table_says(tmp_path: Path, zeros: float, bits: float):
    w = normal(300_000, torch.bfloat16, zeros)
    save_file({"w": w}, tmp_path / "a.safetensors")
    pack_file(tmp_path / "a.safetensors", tmp_path / "a.pack.safetensors")
    assert 8 * (tmp_path / "a.pack.safetensors").stat().st_size / w.numel() < bits


@pytest.fixture
def every(tmp_path: Path) -> Path:
    """A file of tensors of every type and of odd shapes."""
    shapes = {"0-d": (), "empty": (0, 3), "odd": (3, 5, 8), "zeros": (40, 40)}
    specs = {
        f"{code}.{name}": Spec(code, shape, int(np.prod(shape)) * bits // 8)
        for code, bits in BITS.items()
        for name, shape in shapes.items()
        if np.prod(shape) * bits % 8 == 0
    }
    draw = np.random.default_rng(0)

    def read(name: str) -> bytearray:
        return bytearray(specs[name].nbytes) if "zeros" in name else bytearray(draw.bytes(specs[name].nbytes))

    write_tensors(tmp_path / "every.safetensors", specs, read, {"format": "pt", "ä": '"'})
    return tmp_path / "every.safetensors"


@pytest.mark.parametrize("block", [packing.BLOCK, 32])
def test_a_file_of_every_type_comes_back_byte_for_byte(every: Path, monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(packing, "BLOCK", block)
    packed, back = every.with_name("every.pack.safetensors"), every.with_name("back.safetensors")
    pack_file(every, packed)
    unpack_file(packed, back)
    assert back.read_bytes() == every.read_bytes()
    assert packed_checksum(packed) == sha256(every)
    assert contents(packed)[0] == every.stat().st_size


def test_what_gets_no_smaller_is_stored_as_it_is(every: Path):
    packed = every.with_name("every.pack.safetensors")
    pack_file(every, packed)
    dense, found = entries(every)[0], entries(packed)[0]
    assert all((found[n].spec == dense[n].spec) == ("zeros" not in n) for n in dense)
    assert all(found[n].spec.nbytes <= dense[n].spec.nbytes for n in dense)


def test_a_header_in_any_order_with_any_spaces_comes_back(tmp_path: Path):
    header = b'{ "b":{"shape":[2],"data_offsets":[1,5],"dtype":"BF16"},\t"\xc3\xa9":{"dtype":"U8",'
    header += b'"data_offsets":[0,1], "shape":[]}}   '
    path, packed, back = (tmp_path / f"{name}.safetensors" for name in ("a", "a.pack", "back"))
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\1\0\0\2\3")
    pack_file(path, packed)
    unpack_file(packed, back)
    assert back.read_bytes() == path.read_bytes()


def test_memory_is_that_of_a_block_and_not_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "BLOCK", 1 << 16)
    save_file({"w": normal(1 << 22, torch.bfloat16, 0.5)}, tmp_path / "a.safetensors")  # 8 MiB
    tracemalloc.start()
    pack_file(tmp_path / "a.safetensors", tmp_path / "a.pack.safetensors")
    unpack_file(tmp_path / "a.pack.safetensors", tmp_path / "back.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20
    assert filecmp.cmp(tmp_path / "a.safetensors", tmp_path / "back.safetensors", shallow=False)


# ---- folders
