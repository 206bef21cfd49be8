"""Quantized weights in a pack: few bits, and the same bytes again."""

import filecmp
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_packed_file import normal

from convexprune._container.codes import decode_codes
from convexprune._container.file import pack_file, unpack_file
from convexprune._storage.tensors import entries
from convexprune.constraints import Grid, Quantized, Unstructured


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


@given(st.binary(max_size=600), st.sampled_from([32, 64]))
def test_bytes_that_are_no_quantized_block_are_refused(data: bytes, group: int):
    try:
        found = decode_codes(data, 4096 * 2, "BF16", 2, group)
    except ValueError:
        return
    assert len(found) == 4096 * 2
