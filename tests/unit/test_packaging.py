"""What a user installs: one top-level package, with the adapters, the validation and the bundled model inside."""

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import import_module
from pathlib import Path

import pytest

import convexprune

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_everything_under_one_name(tmp_path: Path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"convexprune"}
    needed = ("adapters/_huggingface.py", "validation/_perplexity.py", "data/opt-books/model.safetensors", "py.typed")
    needed += ("_rendering/card.md.jinja", "_rendering/page.html.jinja")
    assert {f"convexprune/{n}" for n in needed} <= set(names)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(wheel.read(metadata).decode())
    links = re.findall(r"\]\(([^)]*)\)", str(said.get_payload()))
    assert len(links) > 20 and [link for link in links if not link.startswith("https://")] == []
    assert any("/raw/" in link and link.endswith(".png") for link in links)
    assert said["Description-Content-Type"] == "text/markdown" and "Typing :: Typed" in said.get_all("Classifier", [])


PUBLIC = {
    "convexprune": """
        L1 AbstractPenalty AbstractSolver Certificate Evaluation Inspection KeepZeros Moments OperatorReport
        Packed PermuteResult Problem PruneResult Quadratic Recipe Report ReverseHuber SemiStructured Solution
        Status Support GroupLasso Unstructured Verification advise certify compare compare_samples errors
        evaluate export from_cvxpy inspect keep_zeros load make_solver pack parse_pattern path permute perplexity
        problems prune pruners solve solve_all solver_names solvers to_cvxpy unpack verify Blocks ElasticNet Event MCP
        NuclearNorm RowGroups SCAD TotalVariation""",
    "convexprune.core": """
        L1 AbstractPenalty Certificate GroupLasso Moments Problem Quadratic ReverseHuber Support certify Blocks
        ElasticNet MCP NuclearNorm RowGroups SCAD TotalVariation""",
    "convexprune.constraints": "SemiStructured Unstructured parse_pattern",
    "convexprune.solvers": "AbstractSolver Solution Status make_solver path solve solve_all solver_names",
    "convexprune.pruners": """
        ADMM ALPS METHODS OSSCAR PRUNERS AbstractPruner Convex Damping FISTAPruner LayerEdit LayerProblem Magnitude
        REAP Refitted ShortGPT SparseGPT Wanda Score WandaSP""",
    "convexprune.estimators": """
        ElasticNet ElasticNetCV GroupLasso GroupLassoCV Lasso LassoCV MultiTaskLasso MultiTaskLassoCV""",
    "convexprune.problems": """
        Named Result check load names PenaltyCheck check_penalty""",
}


MODULES = {
    "adapters", "constraints", "core", "errors", "estimators", "problems", "pruners", "quantizers", "recipe", "report",
    "solvers", "validation",
}  # fmt: skip


def test_modules_that_are_not_for_users_have_an_underscore_somewhere_in_their_names():
    package = Path(convexprune.__file__).parent
    found = {path.relative_to(package).with_suffix("").parts for path in package.glob("*.py")}
    for room in (each for each in package.iterdir() if (each / "__init__.py").is_file()):
        found |= {path.relative_to(package).with_suffix("").parts for path in room.rglob("*.py")}
    public = {tuple(p for p in parts if p != "__init__") for parts in found}
    assert {".".join(p) for p in public if p and not any(part.startswith("_") for part in p)} == MODULES


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these(module: str):
    room = import_module(module)
    assert sorted(room.__all__) == sorted(PUBLIC[module].split())
    assert all(getattr(room, name) is not None for name in room.__all__)


@pytest.mark.parametrize("command", [["--help"], ["prune", "--help"], ["--version"]])
def test_help_loads_no_torch_and_takes_no_time(command: list[str]):
    code = (
        "import sys\nfrom convexprune._cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    before = os.times()
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 3  # of a CPU: 0.5 on a free machine, and torch alone takes more than 2


def test_the_names_come_without_torch_until_one_is_used():
    code = "import sys, convexprune; assert 'prune' in dir(convexprune) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code + "; convexprune.errors; assert 'torch' not in sys.modules"], check=True)


@pytest.mark.long
def test_the_package_loads_no_part_of_torch_that_warns_where_nvcc_is_and_no_gpu():
    code = "import sys, convexprune; convexprune.prune; assert 'torch.utils.cpp_extension' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(convexprune, "prone")


def test_an_interrupt_while_the_command_line_is_loaded_is_no_traceback():
    code = (
        "import sys, convexprune.__main__ as door\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "door.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Stopped.\n")
