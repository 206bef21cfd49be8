"""What a command does is told from the first second, whole on a narrow terminal, and by lines where there is none."""

import logging
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

import convexprune._api.calls
from convexprune import _cli as cli
from convexprune._cli.application import Stopped, listening
from convexprune._cli.pruning import summary
from convexprune._progress import Event, begin, followed_by, shown
from convexprune._rendering.facts import facts
from convexprune._storage.staging import Staging
from convexprune.pruners import Damping
from convexprune.report import OperatorReport, Report


def report(name: str, error: float = 0.01, damping: float = 0.1, **facts: float) -> OperatorReport:
    return OperatorReport(
        name, 8, 16, 64, 64, "0.5", error, 2 * error, 1e-5, 1e-3, 1e-6, "SOLVED", 5, 60, facts, 512, 64, 0.5,
        {"rows": 2, "ratio": 0.3, "lower": 0.1, "error": 0.3, "damping": damping}, damping=Damping(damping),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:install .ipywidgets:UserWarning")
def test_a_notebook_keeps_its_own_streams(monkeypatch: pytest.MonkeyPatch):
    """Its display flushes stderr. A proxy that displays what it is given would be flushed again, without end."""
    before = sys.stdout, sys.stderr
    monkeypatch.setattr(shown, "find_spec", lambda name: name == "ipywidgets")
    for notebook in (True, False):
        console = Console(file=StringIO(), force_jupyter=notebook, force_terminal=not notebook)
        with shown._bar(console) as bar:
            assert isinstance(bar, shown.Bar) and ((sys.stdout, sys.stderr) == before) is notebook


def test_a_notebook_without_widgets_gets_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shown, "find_spec", lambda _: None)
    with shown._bar(Console(file=StringIO(), force_jupyter=True)) as lines:
        assert isinstance(lines, shown.Lines)


def test_counter_and_clocks_are_whole_on_a_narrow_terminal():
    terminal = Console(file=StringIO(), width=80, force_terminal=True)
    with shown._bar(terminal) as bar, followed_by(bar):
        step = begin("pruning", 210)
        for number in range(27):
            step(f"model.decoder.layers.{number}.self_attn.out_proj  error 1.0e-02", report("a"))
        line = next(line for line in _screen(bar).splitlines() if "pruning" in line)
        assert "…" in line and " 27/210 " in line and "0:00:0" in line and line.rstrip().endswith("left")
        step = begin("perplexity", 3)
        step("")
        screen = _screen(bar)
        assert "perplexity" in screen and "1/3" in screen and "27/210" not in screen


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_follows_the_pace_of_this_call_however_slow(monkeypatch: pytest.MonkeyPatch):
    """Not of what an earlier call had finished, which is told at once; a step takes minutes."""
    clock, screen = _Clock(), StringIO()
    monkeypatch.setattr(shown.time, "monotonic", clock)
    lines, bar = shown.Lines(Console(file=screen, width=200)), shown.Bar(Progress(*shown._columns(), get_time=clock))
    with followed_by(bar, lines):
        step = begin("pruning", 8, 4)
        for number in range(6):
            clock.now += 0.0 if number < 4 else 300.0
            step("", report(f"a.layers.{number}.q"))
    clock.now += 100.0
    assert _screen(bar).rstrip().endswith("6/8 0:11:40 0:08:20 left")
    assert screen.getvalue().splitlines() == [
        "pruning, 4/8 are finished",
        "pruned 5/8, about 0:30:00 left  a.layers.4: error at most 1.0e-02, gap 1e-05",
    ]


def _screen(bar: object) -> str:
    assert isinstance(bar, shown.Bar)
    screen = StringIO()
    Console(file=screen, width=80).print(bar._progress.get_renderable())
    return screen.getvalue()


def test_the_start_of_a_command_is_on_the_screen():
    terminal = Console(file=StringIO(), width=80, force_terminal=True)
    with shown.following(terminal):
        pass
    assert "starting" in terminal.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_quiet_hides_warnings_and_the_bars_of_others_and_no_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="told"), shown.following(quiet=True):
        begin("phase", 2)("step")
        print("a bar", file=sys.stderr)
        logging.getLogger("other").warning("a warning")
        warnings.warn("another", stacklevel=1)
        raise ValueError("told")
    logging.getLogger("other").error("an error afterwards")
    assert not any(said in (err := capsys.readouterr().err) for said in ("a bar", "warning", "another", "phase")), err
    assert not logging.root.manager.disable
    print("seen again", file=sys.stderr)
    assert "seen again" in capsys.readouterr().err


def test_without_a_terminal_there_is_a_line_for_each_phase_and_each_layer(monkeypatch: pytest.MonkeyPatch):
    screen = StringIO()
    with shown.following(Console(file=screen, width=40)):
        step = begin("pruning", 4)
        for name in ("a.layers.0.q", "a.layers.0.fc1.1", "a.layers.1.q", "a.layers.1.fc1.1"):
            step("", report(name, error=0.5 if name.endswith("1") else 0.01))
        monkeypatch.setattr(shown, "QUIET", 0.0)
        begin("gradients", 2)("a.layers.1")
    first, *rest = screen.getvalue().splitlines()
    assert first == "starting"
    assert rest == [
        "pruning",
        "pruned 2/4, about 0:00:00 left  a.layers.0: error at most 5.0e-01, gap 1e-05",
        "pruned 4/4  a.layers.1: error at most 5.0e-01, gap 1e-05",
        "gradients",
        "gradients 1/2, about 0:00:00 left  a.layers.1",
    ]


def test_nobody_has_to_follow_and_who_does_hears_no_more_afterwards(caplog: pytest.LogCaptureFixture):
    heard: list[Event] = []
    with caplog.at_level(logging.INFO, "convexprune"):
        begin("alone", 2)("step")
    assert [record.getMessage() for record in caplog.records] == ["alone", "alone 1/2 step"]
    with followed_by(heard.append), followed_by(None):
        begin("one", 2)("first")
    begin("two")("second")
    assert heard == [Event("one", 0, 2), Event("one", 1, 2, "first")]


def test_python_shows_a_bar_where_somebody_looks_and_calls_back(monkeypatch: pytest.MonkeyPatch):
    screen, heard = StringIO(), list[Event]()

    @shown.visible
    def work(on_progress: object = None) -> str:
        begin("working", 1)("done")
        return "result"

    for terminal in (False, True):
        console = Console(file=screen, force_terminal=terminal, width=60)
        monkeypatch.setattr(shown, "Console", lambda console=console, **_: console)
        assert work(on_progress=heard.append) == "result" and ("working" in screen.getvalue()) == terminal
    assert heard == 2 * [Event("working", 0, 1), Event("working", 1, 1, "done")]


def test_the_summary_fits_80_columns_and_says_what_flatters():
    name = "model.decoder.layers.{}.self_attn.out_proj_of_a_very_long_name_indeed"
    operators = [report(name.format(i), 0.01 * (i + 1), damping=0.148, borrowed_tokens=1) for i in range(9)]
    perplexity = {n: {"value": v, "windows": 32, "window": 256} for n, v in (("dense", 70.356), ("pruned", 70.66))}
    whole = Report(
        {"evaluation": "self"},
        {},
        {},
        operators,
        {"prune": 179.0},
        perplexity,
        warnings=["too [few] words"],
        bytes=2_000_000,
    )
    console = Console(file=StringIO(), width=200, markup=False)
    console.print(summary(whole))
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    for said in (
        "50.00% of 1,152 weights in 9 operators", "mean 5.0e-02, worst 9.0e-02", "mean 1.0e-01, worst 1.8e-01",
        "damping 0.15", "dense 70.356, pruned 70.660", "wrote itself, which flatters", "1.0e-05, relative",
        "no pruning has less than 0.30 of the error", "179 s; 2.0 MB on disk", "9 operators of experts got fewer",
        "warning too [few] words",
    ):  # fmt: skip
        assert said in words, said
    rounding = replace(report("layers.2.fc2", 1.8e-16), gap=380.0, status="UNCONFIRMED")
    (gap,) = (f.text for f in facts(replace(whole, operators=[*operators, rounding])) if f.name == "largest gap")
    assert gap == "3.8e+02, relative, of a final convex solve: layers.2.fc2, UNCONFIRMED, error 2e-16"


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (Stopped(15), 143), (Stopped(1), 129)])
@pytest.mark.parametrize("begun", [True, False])
def test_who_stops_a_run_is_told_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: KeyboardInterrupt, status: int, begun: bool
):
    def fail(**_: object) -> None:
        if begun:
            Staging(tmp_path / "out", "prune")._claim()
        raise stop

    arguments = ["prune", "some model", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(convexprune._api.calls, "prune", fail)
    monkeypatch.setattr(sys, "argv", ["/bin/convexprune", *arguments])
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == status
    command = f"convexprune prune 'some model' --output {tmp_path / 'out'} --resume"
    assert "Stopped." in result.stderr and (command in result.stderr) == begun


def test_signals_that_ask_to_end_are_heard_unless_they_are_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with listening(), pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a process that goes on is as it was
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "Memory ran out"), (RuntimeError("can't start new thread"), "can't start new thread")],
)
def test_memory_and_threads_that_run_out_are_one_message(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    monkeypatch.setattr(cli, "app", _raising(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        cli.main()


def _raising(error: Exception) -> Callable[..., None]:
    def fail(**_: object) -> None:
        raise error

    return fail


def test_a_command_shows_its_warnings_in_a_line_and_leaves_python_as_it_was(monkeypatch: pytest.MonkeyPatch):
    before, filters, lines = warnings.formatwarning, list(warnings.filters), list[str]()

    def warned(**_: object) -> None:
        lines.append(warnings.formatwarning("mind the step", UserWarning, "stairs.py", 7))

    monkeypatch.setattr(cli, "app", warned)
    cli.main()
    assert lines == ["UserWarning: mind the step\n"]
    assert warnings.formatwarning is before and warnings.filters == filters
