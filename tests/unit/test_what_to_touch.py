"""The table "What to touch" of the architecture page: a toy of each kind, in exactly the files that its row names."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_families import build_family

ROOT = Path(__file__).parents[2]
Edits = dict[str, tuple[str, str] | str]  # by path: the text of a new file, or a text and what replaces it

TOYS: dict[str, Edits] = {
    "a constraint": {
        "convexprune/constraints/_toy.py": """
            from convexprune.constraints._entries import Unstructured

            class Toy(Unstructured):
                def describe(self):
                    return "toy"

                @classmethod
                def parse(cls, text, sparsity, quota):
                    return cls(0.5 if sparsity is None else sparsity) if text == "toy" else None
            """,
        "convexprune/constraints/__init__.py": (
            "KINDS: tuple[type[Constraint], ...] = (",
            "from convexprune.constraints._toy import Toy\nKINDS = (Toy, ",
        ),
    },
    "a grid": {
        "convexprune/constraints/_toys.py": """
            from dataclasses import dataclass
            from convexprune.constraints._grid import Grouped

            @dataclass(frozen=True)
            class Toy(Grouped):
                group: int = 64
                name = "toy"
                values = (-1.0, -0.5, 0.0, 0.5, 1.0)
            """,
        "convexprune/constraints/__init__.py": (
            "GRIDS: dict[str, Callable[[int], Codebook]] = {",
            "from convexprune.constraints._toys import Toy\nGRIDS = {'toy': Toy, ",
        ),
    },
    "a layout of `export`": {
        "convexprune/_container/toy.py": """
            def export(source, output, allow_changed, add_card):
                output.write_text("toy")
                return output
            """,
        "convexprune/_container/layouts.py": (
            "LAYOUTS = {",
            "LAYOUTS = {'toy': 'toy', ",
        ),
    },
    "a solver": {
        "convexprune/solvers/_toy.py": """
            from convexprune.solvers._fista import FISTA

            class Toy(FISTA):
                pass
            """,
        "convexprune/solvers/__init__.py": ("_PLACES = {", '_PLACES = {"toy": ("_toy", "Toy"),'),
        "convexprune/_schema/settings.py": ('choices=("fista", "admm",', 'choices=("toy", "fista", "admm",'),
    },
    "a penalty": {
        "convexprune/core/_toy.py": """
            from convexprune.core._penalty import L1

            class Toy(L1):
                pass
            """,
        "convexprune/core/__init__.py": ("\n__all__ = [\n", "\nfrom convexprune.core._toy import Toy\n__all__ = [\n"),
    },
    "a pruner": {
        "convexprune/pruners/_toy.py": """
            from convexprune.pruners._baselines.scores import Magnitude

            class Toy(Magnitude):
                pass
            """,
        "convexprune/pruners/__init__.py": (
            "PRUNERS: dict[str, type[AbstractPruner]] = {",
            "from convexprune.pruners._toy import Toy\nPRUNERS = {'toy': Toy, ",
        ),
        "convexprune/_schema/settings.py": ('METHODS = ("convex", "admm",', 'METHODS = ("convex", "toy",'),
    },
    "a quantizer": {
        "convexprune/quantizers/_toy.py": """
            from convexprune.quantizers._published import Nearest

            class Toy(Nearest):
                pass
            """,
        "convexprune/quantizers/__init__.py": (
            "QUANTIZERS: dict[str, type[AbstractQuantizer]] = {",
            "from convexprune.quantizers._toy import Toy\nQUANTIZERS = {'toy': Toy, ",
        ),
        "convexprune/_schema/settings.py": ('quantizer: Literal["descent"', 'quantizer: Literal["toy", "descent"'),
    },
    "a step of a layer": {
        "convexprune/_layerwise/steps/toy.py": """
            from convexprune._layerwise.pipeline import AbstractLayerStep

            class Toy(AbstractLayerStep):
                def __call__(self, context):
                    for operator in context.layer.operators:
                        operator.write(operator.read() / 2)
            """,
        "convexprune/_layerwise/work.py": (
            "[Prune(), Repair(), Quantize(), ",
            "[Prune(), __import__('convexprune._layerwise.steps.toy', fromlist='Toy').Toy(), Quantize(), ",
        ),
    },
    "a setting": {
        "convexprune/_schema/settings.py": (
            "    damping: float",
            '    toy: int = setting(3, "A toy.")\n    damping: float',
        ),
    },
}

USE = """
import json, sys
from pathlib import Path
import torch
import convexprune
from convexprune._cli import app
from convexprune.core import Problem, Quadratic, Toy
from typer.testing import CliRunner

settings = dict(dataset=torch.randint(2, 60, (4, 16)), num_calibration_samples=3, held_out_samples=1, bound_rows=0)
where = sys.argv[1]
plain = convexprune.prune(where, method="toy", pattern="toy", toy=4, **settings).report
solved = convexprune.prune(where, solver="toy", quantize="toy", group_size=-1, quantizer="toy", **settings).report
gram, weight = torch.eye(4), torch.ones(2, 4)
answer = convexprune.solve(Problem(Quadratic(gram, weight, weight.square().sum(1)), Toy(0.25)))
print(json.dumps({
    "recipe": plain.recipe, "patterns": sorted({o.pattern for o in plain.operators}),
    "errors": [o.relative_error for o in plain.operators], "solver": solved.recipe["solver"],
    "grids": sorted({o.pattern for o in solved.operators}), "quantizer": solved.recipe["quantizer"],
    "penalty": answer.weight.tolist(), "layout": convexprune.export(".", Path(where) / "toy", "toy").read_text(),
    "help": "--toy" in CliRunner().invoke(app, ["prune", "--help"]).output,
}))
"""


def rows() -> dict[str, str]:
    """The rows of the table: the files by the thing to add."""
    table = (ROOT / "docs" / "architecture.md").read_text().split("## What to touch")[1]
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE))


@pytest.mark.parametrize("kind", TOYS)
def test_a_row_names_every_file_that_its_toy_needs(kind: str):
    (named,) = [files for thing, files in rows().items() if thing.split(" (")[0] == kind]
    for path in TOYS[kind]:
        folder, name = path.rsplit("/", 1)
        assert path.removeprefix("convexprune/") in named or f"`{name}`" in named or f"`{folder}/`" in named, path


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a copy of the package does that has all toys."""
    copy = tmp_path_factory.mktemp("toys")
    for room in ("convexprune", "adapters", "validation"):
        shutil.copytree(ROOT / room, copy / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path, edit in ((path, edit) for toy in TOYS.values() for path, edit in toy.items()):
        if isinstance(edit, str):
            (copy / path).write_text(re.sub(r"^ {12}", "", edit, flags=re.MULTILINE))
        else:
            text = (copy / path).read_text()
            assert edit[0] in text, f"{path} no longer has {edit[0]!r}"
            (copy / path).write_text(text.replace(*edit))
    build_family("llama").save_pretrained(copy / "model")
    variables = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, str(copy / "model")]
    done = subprocess.run(command, env=variables, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_toys_of_all_kinds_are_used(used: dict[str, Any]):
    assert used["recipe"]["method"] == used["recipe"]["pattern"] == "toy" and used["recipe"]["toy"] == 4
    assert used["patterns"] == ["toy"] and used["solver"] == used["quantizer"] == "toy"
    assert all("toy" in grid for grid in used["grids"])
    assert used["layout"] == "toy" and used["help"]
    assert used["penalty"] == [[0.75] * 4] * 2


def test_the_toy_step_is_in_the_report(used: dict[str, Any]):
    assert min(used["errors"]) > 0.25  # half of each weight alone is a relative error of a quarter
