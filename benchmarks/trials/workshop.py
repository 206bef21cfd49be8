"""What the rows name: models `m/NAME`, texts `t/NAME` and finished runs `r/NAME`, each made when it is first named."""

import json
import random
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import MODELS, Maker
from runner import in_child

from convexprune._cli import main as command_line
from convexprune.adapters import EMBEDDED

SAMPLES = "--dataset t/ok.txt --nsamples 4 --seqlen 32"
RUN = f"{SAMPLES} --bound-rows 0"
NAMED = re.compile(r"\b([mtr])/(model with spaces é中|\[brackets\]|[\w.]+)")


def supply(text: str) -> None:
    """Make what `text` names, as far as it is known here and not there yet."""
    for kind, name in dict.fromkeys(NAMED.findall(text.replace("...", SAMPLES))):
        path = Path(kind) / name
        if name in MAKERS[kind] and not path.exists():
            path.parent.mkdir(exist_ok=True)
            status, said = in_child(lambda path=path, make=MAKERS[kind][name]: make(path), 300)
            assert status == 0, f"{path}: {said}"


def command(lines: str) -> None:
    """Command lines, joined by ` ; `: all but the last only prepare; `...` stands for the usual data."""
    *before, last = lines.split(" ; ")
    for line in before:
        ran(line, 300)
    _command(last)


def ran(line: str, within: float = 120) -> tuple[int | None, str]:
    """(exit status, or None if it was stopped, and what was printed) of a command line."""
    return in_child(lambda: _command(line), within)


def _command(line: str) -> None:
    words = shlex.split(line)
    if "..." in words:
        at = words.index("...")
        words[at : at + 1] = USUAL[words[0]].split()
    if words[0] in ("prune", "permute", "compare") and "--output" not in words:
        words += ["--output", "out"]
    sys.argv = ["convexprune", *words]
    command_line()


USUAL = {
    "prune": RUN,
    "permute": SAMPLES,
    "compare": f"{SAMPLES} --no-plots",
    "verify": f"{SAMPLES} --sample 1",
}


def words(count: int) -> str:
    """Text of words of the bundled tokenizer, some of them often, the same each time."""
    known = sorted(set(re.findall(r"[A-Za-z]{2,}", (EMBEDDED / "tokenizer.json").read_text())))
    draw = random.Random(0)
    draw.shuffle(known)
    chosen = draw.choices(known, [1 / (10 + rank) for rank in range(len(known))], k=count)
    return "\n".join(" ".join(chosen[start : start + 12]) for start in range(0, count, 12))


def _file(content: Callable[[], str | bytes]) -> Maker:
    def make(path: Path) -> None:
        new = content()
        path.write_bytes(new if isinstance(new, bytes) else new.encode())

    return make


def _lines(*objects: Any) -> Maker:
    return _file(lambda: "".join(json.dumps(o) + "\n" for o in objects))


def _finished(options: str) -> Maker:
    def make(path: Path) -> None:
        supply("m/llama t/ok.txt")
        command(f"prune m/llama {RUN} {options} --output {path}")

    return make


OK = 6000  # words: some 300 windows of 32 tokens
TEXTS: dict[str, Maker] = {
    "ok.txt": _file(lambda: words(OK)),
    "empty.txt": _file(str),
    "oneline.txt": _file(lambda: "one line"),
    "blank.txt": _file(lambda: "\n" * 20),
    "binary.txt": _file(lambda: bytes(random.Random(0).randbytes(50_000))),
    "nul.txt": _file(lambda: b"\0" * 50_000),
    "latin1.txt": _file(lambda: words(OK).encode() + "°".encode("latin-1")),
    "utf16.txt": _file(lambda: words(OK).encode("utf-16")),
    "hugeline.txt": _file(lambda: words(OK).replace("\n", " ") * 250),
    "repeat.txt": _file(lambda: "word " * 20_000),
    "ok.csv": _file(lambda: words(OK)),
    "ok.md": _file(lambda: words(OK)),
    "ok.json": _file(lambda: json.dumps({"text": words(OK)})),
    "ok.jsonl": _lines(*({"text": words(OK)} for _ in range(3))),
    "bom.jsonl": _file(lambda: b"\xef\xbb\xbf" + json.dumps({"text": words(OK)}).encode()),
    "notext.jsonl": _lines({"words": "x"}),
    "broken.jsonl": _file(lambda: '{"text": "a"}\n{broken\n'),
    "nulltext.jsonl": _lines({"text": None}),
    "inttext.jsonl": _lines({"text": 5}),
    "lists.jsonl": _lines([1, 2]),
}
RUNS: dict[str, Maker] = {
    "wanda": _finished("--method wanda"),
    "sparsegpt": _finished("--method sparsegpt --allocation uniform"),
}
MAKERS: dict[str, dict[str, Maker]] = {"m": MODELS, "t": TEXTS, "r": RUNS}
