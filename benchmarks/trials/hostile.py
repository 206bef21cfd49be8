"""Checkpoints and folders from someone else: refused or pruned rightly, and never a traceback, a hang or a leak."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from calls import zeros
from rows import Checks
from runner import in_child
from transformers import AutoModelForCausalLM
from workshop import RUN, command, ran

rows = Checks("reliability", needs="m/llama t/ok.txt r/wanda")
REFUSED = 2


def refused(line: str, within: float = 60) -> str:
    """What a command says that has to be refused: exit status 2, no traceback, in time."""
    status, said = ran(line, within)
    assert status is not None, f"no answer in {within:.0f} s"
    assert "Traceback (most recent call last)" not in said, said[said.rindex("Traceback") :][-160:]
    assert status == REFUSED, f"exit status {status}: {said[-120:]}"
    return said


def refused_or_whole(model: str) -> None:
    """Either an error, or a folder that loads with half of its weights zero."""
    status, said = ran(f"prune {model} {RUN} --output out")
    if status == REFUSED:
        assert "Traceback" not in said, said[-160:]
        return
    assert status == 0, f"exit status {status}: {said[-160:]}"
    loaded, info = cast(Any, AutoModelForCausalLM).from_pretrained("out", output_loading_info=True)
    assert not info["missing_keys"], f"{len(info['missing_keys'])} tensors are missing"
    assert abs(zeros(loaded) - 0.5) < 0.001, f"pruned to 50 %, and {zeros(loaded):.0%} of the weights are zero"


@rows.row("An index that names shards as m/{}: refused, or the result is whole and pruned.",
          each=("traversal", "absolute", "subfolders", "samename"))  # fmt: skip
def index(model: str) -> None:
    refused_or_whole(f"m/{model}")


@rows.row("A damaged checkpoint, m/{}, is refused without a traceback, in 60 seconds.",
          each=("indextext", "indexlist", "indexempty", "indexnumbers", "dangling", "weightsfolder", "textwidth",
                "badmerge", "fifo", "millionlayers", "lora", "overlapping"))  # fmt: skip
def checkpoint(model: str) -> None:
    refused(f"prune m/{model} {RUN} --output out")


@rows.row("A pickle that would run code, with --allow-pickle: nothing runs, and the error is ours.")
def evil_pickle() -> None:
    said = refused(f"prune m/evil {RUN} --allow-pickle --output out")
    assert not Path("executed").exists(), f"it ran: {said}"


@rows.row("A link in the model folder to a file elsewhere is not followed into the result.")
def link() -> None:
    ran(f"prune m/link {RUN} --output out")
    copied = Path("out/notes.txt")
    assert not copied.exists() or "root:" not in copied.read_text(), "/etc/passwd is in the result"


@rows.row("Code that a configuration names, and that nobody trusted, is neither run nor copied into the result.")
def brought_code() -> None:
    """A decoder, m/named."""
    _, said = ran(f"prune m/named {RUN} --output out")
    assert "it runs" not in said, said[-160:]
    assert not Path("out/own.py").exists(), "own.py is in the result"


@rows.row("Links planted under the names of temporary files and of the lock are not written through.")
def planted_links() -> None:
    Path("victim").write_text("mine")
    Path("out").mkdir()

    def plant() -> None:
        names = ("model.safetensors", "config.json", "report.json", "recipe.yaml", "run.json")
        for name in ("run.lock", *(f".{name}.{os.getpid()}.part" for name in names)):
            (Path("out") / name).symlink_to(Path("victim").absolute())
        command(f"prune m/llama {RUN} --method wanda --output out")

    in_child(plant, 100)
    assert Path("victim").read_text() == "mine", "another file was overwritten through a link"


ALIASES = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]" for n in range(10)]
REPORTS = {
    "truncated": lambda text: text[: len(text) // 2],
    "object": lambda _: "{}",
    "list": lambda _: "[]",
    "empty": lambda _: "",
    "nokeys": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "operators"}),
    "unknown": lambda text: json.dumps(json.loads(text) | {"unknown": 1}),
    "deep": lambda _: "[" * 100_000 + "]" * 100_000,
    "operators": lambda text: json.dumps(json.loads(text) | {"operators": [{"name": 1}]}),
}
RECIPES = {
    "list": "[1, 2]",
    "text": "hello",
    "empty": "",
    "numbers": "1: 2\n",
    "python": "!!python/object/apply:os.system ['touch executed']\n",
    "alias_top": "\n".join(ALIASES),
    "cut": "model: [\n",
}


def damaged(file: str, content: str) -> None:
    """A finished run with another content of one of its files: `verify` and `--resume` refuse it, or it is as it was."""
    shutil.copytree("r/wanda", "out")
    (Path("out") / file).write_text(content)
    for line in ("verify out --sample 1", f"prune m/llama {RUN} --method wanda --output out --resume"):
        status, said = ran(line, 40)
        assert status is not None, f"{line.split()[0]}: no answer in 40 s"
        assert "Traceback" not in said, f"{line.split()[0]}: {said[said.rindex('Traceback') :][-160:]}"


@rows.row("report.json of a finished run is damaged ({}): verify and --resume without a traceback.", each=REPORTS)
def report(name: str) -> None:
    damaged("report.json", REPORTS[name](Path("r/wanda/report.json").read_text()))


@rows.row("recipe.yaml of a finished run is damaged ({}): no traceback, no hang, nothing runs.", each=RECIPES)
def recipe(name: str) -> None:
    damaged("recipe.yaml", RECIPES[name])
    assert not Path("executed").exists(), "it ran"


@rows.row("A recipe with a regular expression that never ends, or with aliases in a known key, does not hang verify.",
          each=("regex", "alias"))  # fmt: skip
def endless(name: str) -> None:
    text = Path("r/wanda/recipe.yaml").read_text()
    if name == "regex":
        new = text.replace("- Linear", "- 're:(.*)*(.*)*(.*)*(.*)*x$'")
    else:
        new = text.replace("method_args: {}", "\n  ".join(["method_args:", *ALIASES]))
    assert new != text
    damaged("recipe.yaml", new)


@rows.row("A missing report.json or recipe.yaml ({}): verify and --resume without a traceback.",
          each=("report.json", "recipe.yaml"))  # fmt: skip
def missing(file: str) -> None:
    shutil.copytree("r/wanda", "out")
    (Path("out") / file).unlink()
    for line in ("verify out --sample 1", f"prune m/llama {RUN} --method wanda --output out --resume"):
        status, said = ran(line, 40)
        assert status is not None and "Traceback" not in said, f"{line.split()[0]}: {said[-160:]}"


@rows.row("An output folder that may not be written is refused early, and not with 'make room'.")
def forbidden() -> None:
    Path("out").mkdir(mode=0o555)
    for path in (Path(), *Path("m/llama").iterdir(), Path("t/ok.txt")):
        path.chmod(0o755)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        command(f"prune m/llama {RUN} --output out/x")

    status, said = in_child(as_nobody, 60)
    assert "Traceback" not in said, said[-160:]
    assert status == REFUSED and "Make room" not in said, f"exit status {status}: {said[-160:]}"


@rows.row("Perplexity of a vocabulary of 130,000 words takes no more than 300 MB above the model.", 300, slow=True)
def evaluation_memory() -> None:
    import resource

    from architectures import llama

    from convexprune.validation import perplexity

    model = llama(vocab_size=130_000, max_position_embeddings=1024)
    tokens = torch.randint(0, 130_000, (1, 1024))
    perplexity(model, tokens[:, :16])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    perplexity(model, tokens)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown <= 300, f"{grown:.0f} MB"
