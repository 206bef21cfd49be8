"""Runs whose ranks prune each layer together: near to one process, resumable, and what is lost is said."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SETTINGS, TOKENS, checksums, forked, on_reports, place_of
from tiny_families import build_family

import convexprune
from convexprune import errors
from convexprune.report import OperatorReport, Report

SEQUENTIAL: dict[str, Any] = SETTINGS | {"prefix": "pruned"}


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launched(size: int, run: Callable[[int], object]) -> list[int]:
    """The processes of a launcher that gives each its rank, and where to meet."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "WORLD_SIZE": str(size)}

    def rank(number: int) -> None:
        os.environ |= meeting | {"RANK": str(number)}
        run(number)

    return [forked(lambda number=number: rank(number)) for number in range(size)]


def ended(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def pruned_by(size: int, out: Path, model: Any, **settings: Any) -> Report:
    """The report of a sequential run of so many ranks."""
    run = {**SEQUENTIAL, **settings}
    children = launched(size, lambda _: convexprune.prune(model, output_dir=out, executor="ranks", **run))
    assert ended(children) == [0] * size
    assert not place_of(out).exists()
    return Report.from_json((out / "report.json").read_text())


@pytest.mark.parametrize(("allocation", "size"), [("uniform", 3), ("rows", 2)])
def test_ranks_that_prune_each_layer_together_have_the_counts_and_certificates_of_one(
    allocation: str, size: int, dense: Path, tmp_path: Path
):
    given: dict[str, Any] = {"method": "convex", "num_calibration_samples": 3, "batch_size": 1, "bound_rows": 1}
    given |= {"method_args": {"rounds": 16}, "allocation": allocation}
    alone = convexprune.prune(dense, output_dir=tmp_path / "convex", **{**SEQUENTIAL, **given}).report
    report = pruned_by(size, tmp_path / str(size), dense, **given)
    assert report.identity["numerics"]["ranks"] == size
    assert [(o.name, o.zeros, o.tokens, o.held_out_tokens, o.solves) for o in report.operators] == [
        (o.name, o.zeros, o.tokens, o.held_out_tokens, o.solves) for o in alone.operators
    ]
    assert all(o.gap is not None and o.gap < 1e-3 and o.bound for o in report.operators)
    assert report.operators[0].relative_error == pytest.approx(alone.operators[0].relative_error, rel=0.01)


@pytest.mark.trained
@pytest.mark.parametrize("layers", ["0", pytest.param("0123", marks=pytest.mark.slow)])
def test_ranks_stay_within_the_stated_tolerance_of_one(layers: str, tmp_path: Path):
    """docs/runs.md: operators of the first layer within 1 %, the mean of all within 1 %, on held-out tokens 1.5 %."""
    tokens = torch.randint(4, 4000, (18, 128), generator=torch.Generator().manual_seed(0))
    run: dict[str, Any] = {"dataset": tokens, "num_calibration_samples": 16, "max_seq_length": 128}
    run |= {"method": "convex", "batch_size": 1, "targets": [rf"re:.*\.layers\.[{layers}]\..*"]}
    one, two = (pruned_by(size, tmp_path / str(size), None, **run).operators for size in (1, 2))
    assert [(o.name, o.zeros) for o in one] == [(o.name, o.zeros) for o in two]
    ratios = torch.tensor([b.relative_error / a.relative_error for a, b in zip(one, two, strict=True)]).log()
    held_out = torch.tensor([(b.held_out_error or 0) / (a.held_out_error or 1) for a, b in zip(one, two, strict=True)])
    assert ratios[["layers.0." in o.name for o in one]].abs().max() <= 0.01
    assert ratios.mean().abs() <= 0.01
    assert held_out.log().mean().abs() <= 0.015


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_whose_tokens_are_with_other_ranks_borrow_as_alone(family: str, tmp_path: Path):
    build_family(family).save_pretrained(tmp_path / "dense")
    given: dict[str, Any] = SEQUENTIAL | {"dataset": TOKENS % 100 + 2}
    alone = convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "alone", **given).report
    report = pruned_by(2, tmp_path / "out", tmp_path / "dense", **given)
    assert [(o.name, o.zeros) for o in report.operators] == [(o.name, o.zeros) for o in alone.operators]
    first = [o for o in alone.operators if ".layers.0." in o.name]
    assert any(o.facts.get("borrowed_tokens") for o in first)
    assert [(o.tokens, o.facts) for o in first] == [(o.tokens, o.facts) for o in report.operators[: len(first)]]


@pytest.mark.parametrize(("pattern", "family"), [("experts", "mixtral"), ("layers", "llama")])
def test_ranks_remove_the_same_parts_as_one(pattern: str, family: str, tmp_path: Path):
    build_family(family).save_pretrained(tmp_path / "dense")
    given: dict[str, Any] = SEQUENTIAL | {"dataset": TOKENS % 100 + 2, "method": "convex", "pattern": pattern}
    alone = convexprune.prune(tmp_path / "dense", output_dir=tmp_path / "alone", **given).report
    report = pruned_by(2, tmp_path / "out", tmp_path / "dense", **given)
    assert report.narrowed == alone.narrowed and report.narrowed
    names = {path.name for path in (tmp_path / "out").glob("*.json")}
    (said,) = names & {f"{each}.json" for each in ("experts", "layers")}
    assert (tmp_path / "out" / said).read_bytes() == (tmp_path / "alone" / said).read_bytes()
    for one, two in zip(alone.operators, report.operators, strict=True):
        assert (one.name, one.zeros) == (two.name, two.zeros)
        assert one.relative_error == pytest.approx(two.relative_error, rel=0.02, abs=1e-6)


def test_a_script_may_have_introduced_the_ranks_to_each_other(dense: Path, tmp_path: Path):
    def rank(number: int) -> None:
        torch.distributed.init_process_group()
        convexprune.prune(dense, output_dir=tmp_path / "out", executor="ranks", **SEQUENTIAL)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    assert ended(launched(2, rank)) == [0, 0]


def test_a_model_in_memory_is_pruned_in_every_rank(dense: Path, tmp_path: Path):
    def rank(number: int) -> None:
        model = convexprune.adapters.load(dense, device="cpu").model
        convexprune.prune(model, output_dir=tmp_path / "out", executor="ranks", **SEQUENTIAL)
        model.save_pretrained(tmp_path / f"rank-{number}")

    assert ended(launched(2, rank)) == [0, 0]
    one, two, out = (checksums(tmp_path / name) for name in ("rank-0", "rank-1", "out"))
    assert one.keys() == two.keys() and one == two == out


def test_a_team_that_loses_a_rank_says_so_and_goes_on_with_the_same_bits(dense: Path, tmp_path: Path):
    pruned_by(2, tmp_path / "peace", dense)
    out = tmp_path / "out"

    def dying(number: int) -> None:
        on_progress = on_reports(_dies) if number == 0 else None
        with pytest.raises(errors.PruningError, match="Another rank of this run was lost"):
            convexprune.prune(dense, output_dir=out, executor="ranks", on_progress=on_progress, **SEQUENTIAL)

    assert ended(launched(2, dying)) == [-signal.SIGKILL, 0]
    assert len(list((place_of(out) / "work" / "layers").glob("*.json"))) == 1
    (place_of(out) / "work" / "hidden" / "00001.pruned.1.bin").write_bytes(b"damaged")  # what one rank keeps for itself
    with pytest.raises(errors.OutputError, match="ranks: 2 then, 1 now"):
        convexprune.prune(dense, output_dir=out, resume=True, **SEQUENTIAL)
    pruned_by(2, out, dense)
    assert checksums(out) == checksums(tmp_path / "peace")


def _dies(report: OperatorReport) -> None:
    if ".layers.1." in report.name:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_a_team_killed_at_any_moment_goes_on_with_the_same_bits(moment: int, dense: Path, tmp_path: Path):
    pruned_by(2, tmp_path / "peace", dense)
    run = {**SEQUENTIAL, "output_dir": tmp_path / "out", "executor": "ranks"}
    children = launched(2, lambda _: convexprune.prune(dense, **run))
    time.sleep(0.05 + 0.1 * moment)
    for child in children:
        os.kill(child, signal.SIGKILL)
    ended(children)
    pruned_by(2, tmp_path / "out", dense)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "peace")


def test_what_a_team_cannot_do_is_refused(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = {**SEQUENTIAL, "output_dir": tmp_path / "out", "executor": "ranks"}
    with pytest.raises(errors.RecipeError, match="MASTER_ADDR, MASTER_PORT must say where they meet"):
        convexprune.prune(dense, **run)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(errors.RecipeError, match="3 ranks share 2 batches"):
        convexprune.prune(dense, **run)
    assert list(tmp_path.iterdir()) == []
