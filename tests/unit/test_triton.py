"""Nothing is written in Triton by hand, because what torch.compile writes for a GPU reads and writes memory once."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROUNDING = 1e-5  # float32, sums of a few products
KERNELS: dict[str, tuple[Any, ...]] = {  # by function: the tensors that its kernel reads, and those that it writes
    "_ahead": (4, 3),
    "_strengths": (2, 1),
    "_soft": (2, 1),
    "_shrink_ahead": (3, 1),
    "_advance": (9, 7),  # [m 1] counted; of each, two are what it wrote itself or writes again
    "_extrapolate": (4, 3),
    "_scores": (3, 1),
    "_parts": (2, 2),
    "_with_digit": ((3, 15), (3, 1)),  # all counts of [m n] in one pass; the rest is of [m 15]
    "_ranks": (1, 4),
    "_middle": (1, 1),
    "_gradient": (3, 1),
    "_target": (3, 2),
    "_parted": (2, 2),
    "fractions": ((1, 1), (2, 1)),  # the first is of [m 1]
    "_nearer": (3, 1),
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install 'convexprune[triton]'")
def test_a_function_is_one_kernel_whose_results_are_those_op_by_op():
    script = Path(__file__).parents[1] / "triton_code.py"
    variables = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {name: of if isinstance(of[0], tuple) else (of,) for name, of in KERNELS.items()}
    assert {each["name"]: each["kernels"] for each in found} == {
        name: list(map(list, of)) for name, of in kernels.items()
    }
    assert all(each["apart"] <= ROUNDING for each in found)
