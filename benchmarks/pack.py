"""The tables of docs/pack.md: bits a weight and speed of packs, and of other codings of the same tensors.

    python benchmarks/pack.py MODEL [--dtype bfloat16] [--codings]
    python benchmarks/pack.py PRUNED --as-it-is  # of matrices that have zeros already

MODEL is a folder with safetensors. The smallest entries of each matrix of its decoder layers are set to zero (magnitude
pruning), and the model is packed and unpacked. Speeds are bytes of the unpacked files by seconds of one CPU core.
"""

import argparse
import filecmp
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from convexprune import Packed, pack, unpack
from convexprune._container import format as coding
from convexprune._storage.tensors import CODES, DTYPES, Entry, Spec, entries, raw, write_tensors

SHARES = (0.0, 0.5, 0.6, 0.7, 0.8)
Made = TypeVar("Made")


def is_pruned(name: str, entry: Entry) -> bool:
    return ".layers." in name and len(entry.spec.shape) == 2


def pruned(name: str, entry: Entry, share: float, dtype: torch.dtype) -> Tensor:
    weight = entry.read().to(dtype)
    if not share or not is_pruned(name, entry):
        return weight
    size = weight.float().abs()
    threshold = size.flatten().kthvalue(round(share * size.numel())).values
    return torch.where(size <= threshold, torch.zeros_like(weight), weight)


def timed(call: Callable[[], Made]) -> tuple[Made, float]:
    """What a call gives, and the CPU seconds that it takes."""
    before = time.process_time()
    made = call()
    return made, time.process_time() - before


def folder(model: dict[str, Entry], share: float, dtype: torch.dtype) -> tuple[Packed, float, float]:
    """The pack of the pruned model, which was unpacked and compared; MB/s to pack and to unpack."""
    with TemporaryDirectory() as place:
        plain, packed, back = (Path(place) / name for name in ("plain", "packed", "back"))
        plain.mkdir()
        specs = {name: spec_of(entry, dtype) for name, entry in model.items()}
        file = plain / "model.safetensors"
        write_tensors(file, specs, lambda name: pruned(name, model[name], share, dtype), {})
        made, packing = timed(lambda: pack(plain, packed))
        _, unpacking = timed(lambda: unpack(packed, back))
        assert filecmp.cmp(file, back / file.name, shallow=False)
    return made, made.before / 1e6 / packing, made.before / 1e6 / unpacking


def as_it_is(matrices: dict[str, Entry], dtype: torch.dtype) -> str:
    """The share of zeros of matrices that have many, and the bits that a weight of them takes."""
    zeros = {name: int((entry.read() == 0).sum()) for name, entry in matrices.items()}
    sizes = {name: entry.read().numel() for name, entry in matrices.items()}
    sparse = [name for name in matrices if zeros[name] > 0.1 * sizes[name]]
    bits = folder({name: matrices[name] for name in sparse}, 0.0, dtype)[0].bits
    share = sum(zeros[name] for name in sparse) / sum(sizes[name] for name in sparse)
    return f"{len(sparse)} matrices, {share:.1%} zeros: {bits:.2f} bits a weight"


def spec_of(entry: Entry, dtype: torch.dtype) -> Spec:
    count = entry.spec.nbytes // DTYPES[entry.spec.code].itemsize
    return Spec(CODES[dtype], entry.spec.shape, count * dtype.itemsize)


# ---- other codings of the same tensors


def blocks(model: dict[str, Entry], share: float, dtype: torch.dtype) -> Iterator[bytes]:
    for name, entry in model.items():
        if is_pruned(name, entry):
            data = bytes(raw(pruned(name, entry, share, dtype)))
            yield from (data[begin : begin + coding.BLOCK] for begin in range(0, len(data), coding.BLOCK))


def planes(block: bytes, rotate: bool, level: int) -> int:
    """A mask and the two bytes of kept values apart, as they are or with the sign behind."""
    x = np.frombuffer(block, np.uint16)
    values = x.take(np.flatnonzero(x))
    if rotate:
        values = (values << 1) | (values >> 15)
    compress = zstandard.ZstdCompressor(level=level).compress
    return sum(len(compress(part.tobytes())) for part in (np.packbits(x != 0), *values.view(np.uint8).reshape(-1, 2).T))


def ours(block: bytes, code: str, level: int) -> int:
    coding.FAST = zstandard.ZstdCompressionParameters.from_level(level, min_match=7, hash_log=6)
    return len(coding.encode(block, code, 2))


def codings(model: dict[str, Entry], dtype: torch.dtype) -> None:
    code = CODES[dtype]
    kinds: Mapping[str, Callable[[bytes], float]] = {
        "the file by zstd -3": lambda b: len(zstandard.compress(b, 3)),
        "mask, kept values, not compressed": lambda b: len(b) / 16 + 2 * np.count_nonzero(np.frombuffer(b, np.uint16)),
        "mask, two byte planes, zstd -3": lambda b: planes(b, False, 3),
        "the same, sign last, zstd -3": lambda b: planes(b, True, 3),
    } | {f"ours, zstd -{level}": partial(ours, code=code, level=level) for level in (1, 3, 9)}
    print(
        "\n| coding |", " | ".join(f"{share:.0%}" for share in SHARES), "| MB/s |\n|---|" + "---|" * (len(SHARES) + 1)
    )
    for name, size in kinds.items():
        bits, took, read = list[float](), 0.0, 0
        for share in SHARES:
            data = list(blocks(model, share, dtype))
            sizes, more = timed(partial(list, map(size, data)))
            count = sum(map(len, data))
            bits.append(16 * sum(sizes) / count)
            took, read = took + more, read + count
        print(f"| {name} |", " | ".join(f"{b:.2f}" for b in bits), f"| {read / took / 1e6:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--codings", action="store_true", help="other codings as well (16-bit types)")
    parser.add_argument("--as-it-is", action="store_true", help="prune nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    model = {n: e for path in sorted(given.model.glob("*.safetensors")) for n, e in entries(path)[0].items()}
    matrices = {name: entry for name, entry in model.items() if is_pruned(name, entry)}
    if given.as_it_is:
        print(as_it_is(matrices, dtype))
        return
    print(
        "| zeros | bits a weight, pruned matrices | bits a weight, all | size of the file | MB/s to pack | to unpack |"
    )
    print("|---|---|---|---|---|---|")
    for share in SHARES:
        alone, (whole, packing, unpacking) = folder(matrices, share, dtype)[0], folder(model, share, dtype)
        cells = [f"{share:.0%}", f"{alone.bits:.2f}", f"{whole.bits:.2f}", f"{whole.after / whole.before:.1%}"]
        print("|", " | ".join([*cells, f"{packing:.0f}", f"{unpacking:.0f}"]), "|")
    if given.codings:
        codings(model, dtype)


if __name__ == "__main__":
    main()
