"""Runs that are killed, short of room, started twice or looked at: nothing is lost, and what is said helps."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hostile import refused
from reliability import TINY, WANDA, checksums, stopped
from rows import Checks
from runner import hide, in_child
from workshop import RUN, command, ran

import convexprune
from convexprune.errors import ConvexpruneError

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("certificate_picture.py", "own_solver.py", "prune_llama.py", "prune_opt.py", "sparse_regression.py")
rows = Checks("reliability", needs="m/llama m/deep t/ok.txt r/wanda")
SPARSEGPT = f"prune m/deep {RUN} --method sparsegpt --allocation uniform --output out"


def signalled(number: int, line: str = SPARSEGPT) -> tuple[int, str]:
    """(exit status, what was printed) of a command that got a signal once its first layer was finished.

    Whoever tries this in the background (nohup, &) hands down that signals are ignored: the command begins without.
    """
    with Path("printed").open("w+") as printed:
        code = (
            "import signal, sys; sys.argv[0] = 'convexprune'; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
            "signal.signal(signal.SIGINT, signal.default_int_handler); from convexprune._cli import main; main()"
        )
        words = [sys.executable, "-c", code, *line.split()]
        process = subprocess.Popen(words, stdout=printed, stderr=printed, start_new_session=True)
        until = time.monotonic() + 100
        while time.monotonic() < until and not any(Path(".out.part/work/layers").glob("*.json")):
            time.sleep(0.005)
        process.send_signal(number)
        status = process.wait(60)
        printed.seek(0)
        return status, " ".join(printed.read().split())


@rows.row("{} says how to go on, and the resumed run is bit for bit the undisturbed one.", slow=True,
          each=("SIGTERM", "SIGHUP", "SIGINT"))  # fmt: skip
def signals(name: str) -> None:
    status, said = signalled(getattr(signal, name))
    assert "--resume" in said, f"exit status {status}: {said[-120:]!r}"
    same_after_resume()


@rows.row("kill -9 after a finished layer: the resumed run is bit for bit the undisturbed one.", slow=True)
def killed() -> None:
    signalled(signal.SIGKILL)
    same_after_resume()


def same_after_resume() -> None:
    """Go on, and compare with the same command left in peace."""
    status, said = ran(f"{SPARSEGPT} --resume")
    assert status == 0, said[-160:]
    ran(SPARSEGPT.replace("--output out", "--output peace"))
    assert checksums() == checksums("peace"), "other bits"


@rows.row("The workers of a pool end within 5 seconds of their parent.", 300, slow=True)
def orphans() -> None:
    signalled(signal.SIGKILL, SPARSEGPT + " --executor pool --workers 2")
    time.sleep(5)
    here = str(Path.cwd())
    left = [p.name for p in Path("/proc").glob("[0-9]*") if _works_in(p, here)]
    for process in left:
        os.kill(int(process), signal.SIGKILL)
    assert not left, f"{len(left)} processes go on"


def _works_in(process: Path, folder: str) -> bool:
    try:
        return str((process / "cwd").readlink()) == folder and int(process.name) not in (os.getpid(), os.getppid())
    except OSError:
        return False


@rows.row("Ctrl-C before there is a folder does not say that anything is kept in it.")
def early_interrupt() -> None:
    import convexprune._api.calls

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    convexprune._api.calls.prune = interrupt
    status, said = ran(WANDA)
    assert "kept" not in said, f"exit status {status}: {said[-120:]}"


@rows.row("A file that may not grow (RLIMIT_FSIZE): our error, which says how to go on; resumed, the same bits.")
def file_limit() -> None:
    import resource

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        command(WANDA)

    status, said = in_child(limited, 100)
    assert status == 2 and "resume" in said and "Traceback" not in said, f"exit status {status}: {said[-160:]}"
    status, said = ran(f"{WANDA} --resume")
    assert status == 0 and checksums() == checksums("r/wanda"), f"exit status {status}: {said[-160:]}"


@rows.row("Memory that runs out (RLIMIT_AS {} MB above the loaded process) ends in a message, not in an abort.",
          each=("30", "80", "150"))  # fmt: skip
def memory_limit(megabytes: str) -> None:
    import resource

    def limited() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + int(megabytes) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        command(WANDA)

    status, said = in_child(limited, 100)
    assert status == 0 or (status in (1, 2) and "Traceback" not in said and said), (
        f"exit status {status}: {said[-120:]}"
    )


@rows.row(
    "A folder that vanishes under a run ({}): an error of ours.",
    each=("out", ".out.part/work", ".out.part/work/hidden"),
)
def folder_vanishes(path: str) -> None:
    done: list[Any] = []

    def on_operator(_: Any) -> None:
        if not done:
            shutil.rmtree(path)
        done.append(path)

    try:
        convexprune.prune(
            "m/llama",
            output_dir="out",
            method="wanda",
            on_progress=lambda e: e.report and on_operator(e.report),
            **TINY,
        )
    except ConvexpruneError:
        return


@rows.row("A second process on a folder in use says that a process works there, also without --resume.")
def folder_in_use() -> None:
    said: list[str] = []

    def on_operator(_: Any) -> None:
        if not said:
            said.append(ran(WANDA.replace(RUN, f"{RUN} --threads 1"))[1])

    convexprune.prune(
        "m/llama", output_dir="out", method="wanda", on_progress=lambda e: e.report and on_operator(e.report), **TINY
    )
    assert re.search("(?i)process", said[0]), said[0][-160:]


@rows.row("--resume with another --seed names what differs, without hashes.")
def other_seed() -> None:
    ran(f"{WANDA} --resume")
    shutil.rmtree("out")
    signal_free = WANDA.replace("--output", "--seed 1 --output")
    stopped()
    said = refused(f"{signal_free} --resume")
    assert not re.search("[0-9a-f]{20}", said), said[-160:]


@rows.row("--resume --eval-text of a finished run evaluates, or says that it does not.")
def resume_evaluates() -> None:
    shutil.copytree("r/wanda", "out")
    status, said = ran(f"{WANDA} --resume --eval-text t/ok.txt")
    assert status == 2 or re.search("(?i)perplexity|eval", said), f"exit status {status}: {said[-120:]}"


@rows.row("A refused --resume of a finished run leaves no run.lock in it.")
def refused_lock() -> None:
    shutil.copytree("r/wanda", "out")
    before = set(Path("out").iterdir())
    refused(f"{WANDA} --resume --sparsity 0.7")
    left = {p.name for p in set(Path("out").iterdir()) - before}
    assert not left, f"{left} is left"


@rows.row("`verify DIR` works from another directory.")
def verify_elsewhere() -> None:
    folder = Path("r/wanda").absolute()
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    status, said = ran(f"verify {folder} --sample 1", 60)
    os.chdir("..")
    assert status == 0, f"exit status {status}: {said[-160:]}"


@rows.row("`compare` without matplotlib names --no-plots, or needs none.")
def no_matplotlib() -> None:
    hide("matplotlib", *[name for name in sys.modules if name.startswith("matplotlib.")])
    line = f"compare m/llama --methods wanda {RUN} --eval-text t/ok.txt --eval-windows 2 --eval-window 32 --output out"
    status, said = ran(line.replace(" --bound-rows 0", ""))
    assert status == 0 or "--no-plots" in said, f"exit status {status}: {said[-160:]}"


@rows.row("Into a pipe there is a line for each layer, and the final table fits 80 columns.")
def piped_lines() -> None:
    words = [sys.executable, "-c", "from convexprune._cli import main; main()", *WANDA.split()]
    environment = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
    lines = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=110).stdout.splitlines()
    layers = [line for line in lines if re.search(r"(?i)layer.*\b(0|1|2)\b", line)]
    assert len(layers) >= 2, f"{len(lines)} lines, none of a layer"
    widest = max((line for line in lines if "out" not in line), key=len)
    assert len(widest) <= 80, f"a line of {len(widest)} columns: {widest[:60]}"


@rows.row("examples/{} runs.", 300, slow=True, each=SCRIPTS)
def example(name: str) -> None:
    script = str(EXAMPLES / name)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=290)
    assert run.returncode == 0, run.stderr[-160:]
