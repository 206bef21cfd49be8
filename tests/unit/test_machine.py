"""What of this machine and of our code decides the bits of a result."""

import shutil
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from convexprune._device import machine
from convexprune._runs import executors


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package's code."""
    folder = tmp_path_factory.mktemp("package") / "convexprune"
    skip = shutil.ignore_patterns("data", "__pycache__")
    return Path(shutil.copytree(Path(str(files("convexprune"))), folder, ignore=skip))


@pytest.mark.parametrize(
    ("name", "computes"),
    [
        ("solvers/_fista.py", True), ("_layerwise/steps/prune.py", True), ("adapters/_data/sampling.py", True),
        ("core/_quadratic.py", True), ("_cli/pruning.py", False), ("validation/_results.py", False),
        ("validation/_verify.py", False), ("report.py", False),
    ],
)  # fmt: skip
def test_an_edit_of_what_computes_makes_another_run_and_of_what_shows_does_not(
    package: Path, name: str, computes: bool
):
    before, text = machine.code(package), (package / name).read_text()
    (package / name).write_text(text + "# edited\n")
    try:
        assert (machine.code(package) != before) == computes
    finally:
        (package / name).write_text(text)


def test_a_new_module_is_taken_to_compute(package: Path):
    before = machine.code(package)
    (package / "solvers" / "new.py").touch()
    assert machine.code(package) != before
    (package / "solvers" / "new.py").unlink()
    assert machine.code(package) == before == machine.code()


def test_the_code_is_known_in_a_zipped_wheel_too(package: Path, tmp_path: Path):
    archive = shutil.make_archive(str(tmp_path / "wheel"), "zip", package.parent)
    assert machine.code(zipfile.Path(archive, "convexprune/")) == machine.code(package)


def test_what_is_left_out_of_the_code_is_there():
    assert all((Path(str(files("convexprune"))) / name).exists() for name in machine.SHOWING)


def test_the_kind_of_processor_and_of_gpu_are_named(monkeypatch: pytest.MonkeyPatch):
    named = {"steps": machine.steps("cpu"), "instructions": torch.backends.cpu.get_cpu_capability()}
    monkeypatch.setattr(machine, "prefers_onednn", lambda: True)
    assert machine.processor("cpu") == named | {"products": "oneDNN"} | machine.recorded()
    monkeypatch.setattr(machine, "prefers_onednn", lambda: False)
    here = machine.processor("cpu")
    assert here == named | machine.recorded()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(machine, "eager_because", lambda device: None)  # which would try to compile
    assert machine.installation("cuda:1")["gpu"] == "GPU cuda:1"


def test_a_child_process_is_no_worker_unless_there_are_workers():
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert set(machine.peak_memory("cpu")) == {"process"}
    assert machine.peak_memory("cpu", has_workers=True)["workers"] > 0
    assert executors.Pool.spawns and not executors.Serial.spawns


def test_a_package_of_an_extra_may_be_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    assert machine.versions()["no-such-package"] == "not installed"
