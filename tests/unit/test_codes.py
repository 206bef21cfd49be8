"""Quantized weights in a pack: few bits, and the same bytes again."""

import filecmp
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_packed_file import normal

from convexprune._container.codes import COLUMN, KINDS, Layout, decode_codes
from convexprune._container.file import pack_file, unpack_file
from convexprune._storage.tensors import entries
from convexprune.constraints import Coded, Grid, Quantized, Unstructured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group", "zeros", "most"), [(4, 64, 0.0, 4.0), (3, 128, 0.0, 3.0), (6, 64, 0.5, 3.9)])
def test_what_is_on_a_grid_takes_the_bits_of_its_numbers(
    tmp_path: Path, bits: int, group: int, zeros: float, most: float, dtype: torch.dtype
):
    w = normal(1 << 18, torch.float32, zeros).view(-1, 512)
    quantized = Quantized(Unstructured(0.0), Grid(bits, group)).project(w).to(dtype)
    off = quantized.clone()
    off[-1, -1] += 0.01  # its block is coded like any other
    save_file({"on": quantized, "off": off, "plain": w.to(dtype)}, tmp_path / "a.safetensors")
    pack_file(tmp_path / "a.safetensors", tmp_path / "a.pack.safetensors")
    unpack_file(tmp_path / "a.pack.safetensors", tmp_path / "back.safetensors")
    assert filecmp.cmp(tmp_path / "a.safetensors", tmp_path / "back.safetensors", shallow=False)
    found = entries(tmp_path / "a.pack.safetensors")[0]
    sizes = {name: 8 * entry.spec.nbytes / w.numel() for name, entry in found.items()}
    assert sizes["on"] < most < sizes["off"]


def test_a_negative_zero_is_kept_in_a_quantized_tensor(tmp_path: Path):
    w = Quantized(Unstructured(0.0), Grid(4, 32)).project(normal(1 << 12, torch.float32, 0.3).view(-1, 64)).bfloat16()
    w[-1][w[-1] == 0] = -0.0
    save_file({"w": w}, tmp_path / "a.safetensors")
    pack_file(tmp_path / "a.safetensors", tmp_path / "a.pack.safetensors")
    unpack_file(tmp_path / "a.pack.safetensors", tmp_path / "back.safetensors")
    assert filecmp.cmp(tmp_path / "a.safetensors", tmp_path / "back.safetensors", shallow=False)


@pytest.mark.parametrize("bits", [1.5, 3.0, 4.5])
@pytest.mark.parametrize("shape", [(1024, 256), (3, 256, 256), (4096, 512)])
def test_coded_weights_take_the_bits_of_their_entropy(tmp_path: Path, bits: float, shape: tuple[int, ...]):
    coded, w = Coded(bits), normal(shape[-1] * shape[-2], torch.float32, 0.0).view(shape[-2:])
    stored = coded.project(w).bfloat16().expand(shape).contiguous()  # the largest has two blocks
    save_file({"w": stored, "transposed": stored.mT.contiguous()}, tmp_path / "a.safetensors")
    pack_file(tmp_path / "a.safetensors", tmp_path / "a.pack.safetensors")
    unpack_file(tmp_path / "a.pack.safetensors", tmp_path / "back.safetensors")
    assert filecmp.cmp(tmp_path / "a.safetensors", tmp_path / "back.safetensors", shallow=False)
    for entry in entries(tmp_path / "a.pack.safetensors")[0].values():
        assert 8 * entry.spec.nbytes / stored.numel() < bits + 0.05


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_transposed_weights_are_found(tmp_path: Path, group: int):
    w = Quantized(Unstructured(0.0), Grid(4, group)).project(normal(1 << 17, torch.float32, 0.0).view(-1, 512))
    save_file({"w": w.T.contiguous().bfloat16()}, tmp_path / "a.safetensors")
    pack_file(tmp_path / "a.safetensors", tmp_path / "a.pack.safetensors")
    unpack_file(tmp_path / "a.pack.safetensors", tmp_path / "back.safetensors")
    assert filecmp.cmp(tmp_path / "a.safetensors", tmp_path / "back.safetensors", shallow=False)
    assert 8 * entries(tmp_path / "a.pack.safetensors")[0]["w"].spec.nbytes / w.numel() < 4.3


@given(st.binary(max_size=600), st.sampled_from(KINDS), st.sampled_from([64, 100]))
def test_bytes_that_are_no_quantized_block_are_refused(data: bytes, group: int, columns: int):
    count = 4096 if group > COLUMN else 64 * columns
    try:
        found = decode_codes(data, count * 2, "BF16", 2, Layout(group, columns))
    except ValueError:
        return
    assert len(found) == count * 2
