"""Whether two checkouts prune to the same bits: every method, pattern, prefix and grid, weights and errors side by side.

python benchmarks/same_bits.py OLD NEW [--model DIR] [--layers 0 15] [--windows 6] [--length 256] [--methods convex wanda]

OLD and NEW are checkouts of two commits (`git worktree add OLD COMMIT`); each prunes in a process of its own, on one
thread. What a checkout gave is kept with --write FILE, and FILE may then stand for OLD.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATTERNS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "70 %": {"sparsity": 0.7}, "2:4": {"pattern": "2:4"}}
METHODS = ("convex", "admm", "alps", "sparsegpt", "wanda", "magnitude", "fistapruner")
GRIDS: dict[str, dict[str, Any]] = {
    "int8 in rows": {"quantize": "int8", "group_size": -1},
    "int4": {"quantize": "int4", "group_size": 32},
    "int3 of 50 %": {"quantize": "int3", "group_size": 32, "sparsity": 0.5},
    "3 bits": {"bits": 3.0},
}
QUANTIZERS = ("descent", "gptq", "rtn")
Found = dict[str, dict[str, Any]]  # of each case: the bits of each file, and the error of each operator


def _cases(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    common = {"num_calibration_samples": asked.windows, "max_seq_length": asked.length, "dataset": asked.dataset}
    common["targets"] = [f"re:.*layers\\.({'|'.join(map(str, asked.layers))})\\..*"]
    for method in asked.methods:
        for name, pattern in PATTERNS.items():
            for prefix in ("dense", "pruned"):
                yield f"| {method} | {name} | {prefix} |", common | pattern | {"method": method, "prefix": prefix}
    for quantizer in asked.quantizers:
        for name, grid in GRIDS.items():
            yield f"| {quantizer} | {name} | dense |", common | {"sparsity": 0.0} | grid | {"quantizer": quantizer}


def _prune(asked: argparse.Namespace) -> Found:
    """What the checkout that is on Python's path gives."""
    import convexprune

    found: Found = {}
    for name, settings in _cases(asked):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            result = convexprune.prune(asked.model, output_dir=out, threads=1, bound_rows=0, **settings)
            bits = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}
            found[name] = {"bits": bits, "errors": {o.name: o.relative_error for o in result.report.operators}}
    return found


def _of(checkout: Path) -> Found:
    if checkout.is_file():
        return json.loads(checkout.read_text())
    variables = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", file.name], env=variables, check=True)
        return json.loads(Path(file.name).read_text())


def main() -> None:
    """Print a table of cases, and exit with 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="OLD NEW")
    parser.add_argument("--model", help="a folder; the bundled model unless given")
    parser.add_argument("--layers", nargs="+", type=int, default=[0, 1], help="those to prune")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--dataset", default="self")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--quantizers", nargs="*", default=QUANTIZERS)
    parser.add_argument("--write", type=Path, help="where to keep what the last checkout gives")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        asked.child.write_text(json.dumps(_prune(asked)))
        return
    new = _of(asked.checkouts[-1])
    old = _of(asked.checkouts[0]) if len(asked.checkouts) > 1 else new
    if asked.write:
        asked.write.write_text(json.dumps(new))
    print("| method | pattern | prefix | the same bits | largest difference of an error |\n|---|---|---|---|---|")
    both = [name for name in old if name in new]
    for name in both:
        one, other = old[name], new[name]
        apart = max(abs(other["errors"][k] / error - 1) if error else 0.0 for k, error in one["errors"].items())
        print(f"{name} {'yes' if one['bits'] == other['bits'] else 'no'} | {apart:.0e} |")
    raise SystemExit(any(old[name]["bits"] != new[name]["bits"] for name in both))


if __name__ == "__main__":
    main()
