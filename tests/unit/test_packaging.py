"""What a user installs: one top-level package, with the adapters, the validation and the bundled model inside."""

import subprocess
import sys
import zipfile
from pathlib import Path

import convexprune

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_everything_under_one_name(tmp_path: Path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"convexprune"}
    needed = ("adapters/huggingface.py", "validation/perplexity.py", "data/opt-books/model.safetensors", "py.typed")
    assert {f"convexprune/{n}" for n in needed} <= set(names)


def test_the_public_names_are_those_that_are_exported():
    assert sorted(convexprune.__all__) == sorted(set(convexprune.__all__))
    for name in convexprune.__all__:
        assert getattr(convexprune, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(convexprune, "prone")
