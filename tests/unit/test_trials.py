import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "trials"
RIGHT = "^(sp_neg|dev_typo|q_nan|dead_inputs_wanda|instruction_set)$"  # a row of each kind, all of them quick


@pytest.fixture(scope="module")
def trials():
    return runpy.run_path(str(FOLDER), run_name="trials")


def test_every_row_has_a_name_of_its_own_and_an_old_answer(trials):
    names = Counter(f"{row.list}/{row.name}" for row in trials["all_rows"]())
    assert len(names) > 500
    assert max(names.values()) == 1
    assert set(names) == set(trials["before"]())


def test_rows_that_were_wrong_are_right(trials, capsys):
    status = trials["main"](["--only", RIGHT])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "| all | 5 | 2 | 5 |" in printed


def test_a_row_that_is_not_right_is_told(trials, monkeypatch, capsys):
    monkeypatch.setitem(trials["main"].__globals__, "all_rows", lambda: [_wrong(trials["all_rows"]())])
    assert trials["main"]([]) == 1
    assert "NOT RIGHT" in capsys.readouterr().out


def _wrong(rows):
    from dataclasses import replace

    row = next(row for row in rows if row.name == "sp_neg")
    return replace(row, says="nothing of the kind")


@pytest.mark.slow
def test_every_row_is_right(tmp_path):
    run = subprocess.run(
        [sys.executable, str(FOLDER), "--patience", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=7200
    )
    assert run.returncode == 0, "\n".join(line for line in run.stdout.splitlines() if "NOT RIGHT" in line)
