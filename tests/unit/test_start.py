"""The way from an installed package to a published model, as the first page of the docs has it."""

import re
import shlex
from pathlib import Path
from typing import Any

from test_publishing import Hub, hub
from typer.testing import CliRunner

from convexprune import _cli as cli

__all__ = ["hub"]  # a fixture

ROOT = Path(__file__).parents[2]
QUICK = {
    "doctor": "--checks determinism",
    "prune": "--nsamples 4 --seqlen 32",
    "verify": "--sample 1 --columns 8 --rows 2",
}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def the_ten() -> list[str]:
    page = (ROOT / "docs" / "index.md").read_text()
    _, part = page.split("in ten commands\n")
    return re.findall(r"```sh\n(.*?)```", part, re.DOTALL)[0].splitlines()


def test_ten_commands_lead_to_a_published_model(tiny_opt: Any, hub: Hub, tmp_path: Path, monkeypatch):
    """As written, but for pip and the log-in, and with few samples and checks; the hub is a double."""
    monkeypatch.chdir(tmp_path)
    for saved in (tiny_opt.model, tiny_opt.tokenizer):
        saved.save_pretrained("MODEL")
    for name in ("text.txt", "held-out.txt"):
        Path(name).write_text(TEXT * 200)
    lines = the_ten()
    assert len(lines) == 10 and lines[0] == "pip install '.[cvxpy]'" and lines[8] == "hf auth login"
    for line in lines:
        program, *words = shlex.split(line)
        if program == "convexprune":
            words += QUICK.get(words[0], "").split()
            result = CliRunner().invoke(cli.app, words)
            assert result.exit_code == 0, (line, result.output, result.exception)
    assert hub.made == [("OWNER/NAME", None)] and {"README.md", "model.safetensors"} <= hub.files.keys()
