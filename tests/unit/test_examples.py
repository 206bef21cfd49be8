"""Every example, notebook and Python block of a page runs, but for blocks with a title, which says why not."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from convexprune._api import given
from convexprune.adapters import EMBEDDED
from convexprune.adapters._data import calibration
from convexprune.adapters._loading import loading

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"-?[\d,.]+(e[+-]\d+)?")
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "prune_opt.py"]  # test_bundled's
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = {
    block: (page, title)  # what stands on two pages runs once
    for page in PAGES
    for title, block in re.findall(r"^```python(.*)\n((?s:.*?))^```$", (ROOT / page).read_text(), re.MULTILINE)
}


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with the first of its four decoder layers."""
    folder = tmp_path_factory.mktemp("little") / "model"
    shutil.copytree(EMBEDDED, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    del model.model.decoder.layers[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def shorter(little: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model has one layer, and what it writes is short: both took most of the time."""
    monkeypatch.setattr(loading, "EMBEDDED", little)
    write = calibration.sampled_windows
    monkeypatch.setattr(calibration, "sampled_windows", lambda *a, **b: write(*a, **b | {"length": 64}))
    monkeypatch.setattr(given, "EVALUATION_SAMPLES", 4)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_the_example_runs(path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.name)
def test_the_notebook_runs_and_says_what_is_kept_in_it(path: Path, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(path.read_text())["cells"]
    names: dict[str, object] = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), path.name, "exec"), names)
        kept = "".join(line for each in cell["outputs"] if each.get("name") == "stdout" for line in each["text"])
        assert NUMBER.sub("#", kept) == NUMBER.sub("#", capsys.readouterr().out)
    assert len(names) > 20


def test_the_notebook_makes_no_model_and_no_text_in_place_of_yours(tmp_path: Path):
    cells = json.loads((ROOT / "examples" / "prune_llama.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (making,) = (code for code in codes if "save_pretrained" in code)
    (text := tmp_path / "text.txt").write_text("Call me Ishmael.")
    names: dict[str, object] = {}
    exec(codes[0], names)
    exec(making, names | {"MODEL": str(tmp_path / "mine"), "TEXT": str(text)})
    assert list(tmp_path.iterdir()) == [text] and text.read_text() == "Call me Ishmael."


def test_the_script_for_slurm_starts_ranks_that_go_on(tmp_path: Path):
    """With doubles of `srun`, which prints what it is to start, and `scontrol`."""
    for name, says in {"srun": 'echo "$MASTER_ADDR" "$@"', "scontrol": "printf 'node%s\\n' 1 2"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", str(ROOT / "examples" / "slurm.sh"), "MODEL", "a text.txt", "DIR", "--prefix", "pruned"]
    said = subprocess.run(words, env=os.environ | given, capture_output=True, text=True, check=True).stdout
    assert said == (
        "node1 --kill-on-bad-exit=0 convexprune prune MODEL --dataset a text.txt --output DIR "
        "--executor ranks --threads 8 --resume --prefix pruned\n"
    )


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # the Trainer does, on a CPU too
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize("block", BLOCKS, ids=[f"{page}{i}" for i, (page, _) in enumerate(BLOCKS.values())])
def test_the_block_of_the_page_runs(block: str, monkeypatch, tmp_path: Path):
    page, title = BLOCKS[block]
    monkeypatch.chdir(tmp_path)
    code = compile(block, page, "exec")
    if not title:
        exec(code, {})


def test_the_pages_have_blocks():
    run = [page for page, title in BLOCKS.values() if not title]
    assert run.count("docs/finetune.md") == 3 and len(run) >= 9 and len(BLOCKS) - len(run) <= 5
    assert all(re.fullmatch(r'| title="[^"]+"', title) for _, title in BLOCKS.values())
