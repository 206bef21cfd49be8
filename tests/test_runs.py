"""Runs in a folder: whatever ends one, nothing is lost or wrong, and the bits are those of a run left in peace."""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import convexprune
from convexprune import errors
from convexprune.pipeline import executors, files, layer, machine, output
from convexprune.pipeline.files import locked
from convexprune.pipeline.output import differences
from convexprune.report import OperatorReport, Report

LAYERS = 4
TOKENS = torch.randint(2, 500, (5, 16), generator=torch.Generator().manual_seed(3))
SETTINGS: dict[str, Any] = {
    "method": "sparsegpt", "dataset": TOKENS, "num_calibration_samples": 4, "batch_size": 2, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards."""
    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="session")
def expected(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checksums of what a run left in peace gives."""
    folder = tmp_path_factory.mktemp("peace") / "out"
    convexprune.prune(dense, output_dir=folder, **SETTINGS)
    return checksums(folder)


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def stop_after(number: int) -> Callable[[int], Callable[[OperatorReport], None]]:
    """A `progress` that interrupts the run like Ctrl-C once `number` layers are finished and the next one is begun."""
    told = []

    def tell(report: OperatorReport) -> None:
        told.append(report)
        if len(told) == 7 * number + 1:
            raise KeyboardInterrupt

    return lambda _: tell


@pytest.fixture
def stopped(dense: Path, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted in its third layer."""
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, output_dir=tmp_path / "out", progress=stop_after(2), **SETTINGS)
    return tmp_path / "out"


def forked(run: Callable[[], object]) -> int:
    """The number of a process that runs `run`, and says on the way out whether it could."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def killed(run: Callable[[], object], after: float | None = None) -> int:
    """The exit status of a process that runs `run`, and is killed after so many seconds."""
    child = forked(run)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_finished_folder_is_an_ordinary_one(dense: Path, tmp_path: Path):
    result = convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    names = {path.name for path in dense.iterdir()} | {"recipe.yaml", "report.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert result.report.environment["loading"] == "layer by layer"
    for o in result.report.operators:
        module = loaded.get_submodule(o.name)
        assert isinstance(module, nn.Linear) and int((module.weight == 0).sum()) == o.zeros == o.expected_zeros
    assert result.model is result.model


def test_an_unfinished_run_is_never_overwritten_and_goes_on_when_asked(dense, stopped, expected, monkeypatch):
    with pytest.raises(errors.OutputError, match=r"unfinished run, 2 of its layers finished.*--resume"):
        convexprune.prune(dense, output_dir=stopped, **SETTINGS)
    pruned, told = [], []
    prune_group = layer._prune_group
    monkeypatch.setattr(layer, "_prune_group", lambda name, *rest: (pruned.append(name), prune_group(name, *rest)))
    result = convexprune.prune(dense, output_dir=stopped, resume=True, progress=lambda _: told.append, **SETTINGS)
    assert set(pruned) == {"model.layers.2", "model.layers.3"}  # what was finished is not redone
    assert told == result.report.operators and len(told) == 7 * LAYERS
    assert checksums(stopped) == expected


def test_a_finished_run_is_handed_back(dense: Path, tmp_path: Path):
    first = convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    with pytest.raises(errors.OutputError, match="a finished run"):
        convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    again = convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert again.report == first.report
    with pytest.raises(errors.OutputError, match=r"recipe\.sparsity: null then, 0\.3 now"):
        convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, sparsity=0.3, **SETTINGS)


def _other_model(dense: Path, folder: Path) -> Path:
    shutil.copytree(dense, folder)
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return folder


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "sparsity": ({"sparsity": 0.6}, r"recipe\.sparsity: null then, 0\.6 now"),
    "method": ({"method": "wanda"}, r'recipe\.method: "sparsegpt" then, "wanda" now'),
    "tokens": ({"dataset": TOKENS + 1}, r"tokens\.calibration"),
    "dtype": ({"dtype": "bfloat16"}, r'numerics\.dtype: "float32" then, "bfloat16" now'),
    "threads": ({"threads": 2}, r"numerics\.threads: 1 then, 2 now"),
    "weights": ({}, r"weights\.model-\d+-of-\d+\.safetensors"),
    "code": ({}, "code"),
    "processor": ({}, r'numerics\.steps: "(bfloat16|float32)" then, "(bfloat16|float32)" now'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named_and_refused(dense, stopped, expected, tmp_path, monkeypatch, change: str):
    settings, message = CHANGES[change]
    model = _other_model(dense, tmp_path / "other") if change == "weights" else dense
    with monkeypatch.context() as patch:
        if change == "code":
            patch.setattr("convexprune.pipeline.run._code", lambda: "another")
        if change == "processor":
            here = machine.has_bfloat16(torch.device("cpu"))
            patch.setattr(machine, "has_bfloat16", lambda device: not here)
        with pytest.raises(errors.OutputError, match=f"holds another run; it differs in.*{message}"):
            convexprune.prune(model, output_dir=stopped, resume=True, **SETTINGS | settings)
    convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    assert checksums(stopped) == expected


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _lie(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"zeros": ', b'"zeros": 1'))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip, _cut, _empty, Path.unlink])
@pytest.mark.parametrize(
    "file", ["layers/00000.safetensors", "layers/00001.json", "hidden/00002.dense.bin", "hidden/*"]
)
def test_damaged_files_are_found_and_done_again(dense: Path, stopped: Path, expected, file: str, damage):
    paths = sorted((stopped / "work").glob(file))
    assert paths
    for path in paths:
        damage(path)
    convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    assert checksums(stopped) == expected


def test_a_disk_that_does_not_keep_what_it_is_given_is_found(dense: Path, tmp_path: Path, monkeypatch):
    run = executors.Serial.run

    def damaged(self, job, *rest):
        run(self, job, *rest)
        _flip(job.folder / "layers" / "00001.safetensors")

    monkeypatch.setattr(executors.Serial, "run", damaged)
    with pytest.raises(errors.OutputError, match=r"does not hold what was written to it \(layers \[1\]\)"):
        convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_report_that_is_not_what_was_written_is_done_again(dense: Path, stopped: Path):
    _lie(stopped / "work" / "layers" / "00001.json")
    result = convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    assert all(o.zeros == o.expected_zeros for o in result.report.operators)


def _count_writes(dense: Path, folder: Path, monkeypatch) -> int:
    count, write = 0, files.write

    def counting(file, data):
        nonlocal count
        count += 1
        write(file, data)

    with monkeypatch.context() as patch:
        _patch_write(patch, counting)
        convexprune.prune(dense, output_dir=folder, **SETTINGS)
    return count


def _patch_write(patch: pytest.MonkeyPatch, write: Callable[..., None]) -> None:
    for room in ("pipeline.files", "pipeline.tensors", "pipeline.output", "adapters.shards", "request"):
        patch.setattr(f"convexprune.{room}.write", write)


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_when_there_is_room(dense, tmp_path, expected, monkeypatch):
    total = _count_writes(dense, tmp_path / "peace", monkeypatch)
    write = files.write
    for last in (0, 1, 2, *random.Random(0).sample(range(3, total), 5), total - 1):
        count = 0

        def filling(file, data, last=last):
            nonlocal count
            count += 1
            if count > last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(file, data)

        folder = tmp_path / f"full-{last}"
        with monkeypatch.context() as patch:
            _patch_write(patch, filling)
            with pytest.raises(errors.OutputError, match=r"No space left on device.*--resume"):
                convexprune.prune(dense, output_dir=folder, **SETTINGS)
        assert not list(folder.rglob("*.part"))
        if (folder / "config.json").exists():  # what looks like a model is a whole one
            assert checksums(folder) == expected
        convexprune.prune(dense, output_dir=folder, resume=True, **SETTINGS)
        assert checksums(folder) == expected


def _killed_at_writes(dense: Path, folder: Path, expected, monkeypatch, moments: list[int]) -> None:
    write = files.write
    for last in moments:
        count = 0

        def deadly(file, data, last=last):
            nonlocal count
            count += 1
            if count > last:
                write(file, bytes(data)[: len(bytes(data)) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, data)

        out = folder / f"killed-{last}"
        with monkeypatch.context() as patch:
            _patch_write(patch, deadly)
            assert killed(lambda out=out: convexprune.prune(dense, output_dir=out, **SETTINGS)) == -signal.SIGKILL
        convexprune.prune(dense, output_dir=out, resume=True, **SETTINGS)
        assert checksums(out) == expected
        assert {path.name for path in out.iterdir()} == {path.name for path in dense.iterdir()} | {
            "recipe.yaml",
            "report.json",
        }


def test_killed_in_the_middle_of_any_write(dense, tmp_path, expected, monkeypatch):
    total = _count_writes(dense, tmp_path / "peace", monkeypatch)
    _killed_at_writes(dense, tmp_path, expected, monkeypatch, [0, *random.Random(1).sample(range(1, total), 5)])


@pytest.mark.slow
def test_killed_in_the_middle_of_every_write(dense, tmp_path, expected, monkeypatch):
    total = _count_writes(dense, tmp_path / "peace", monkeypatch)
    _killed_at_writes(dense, tmp_path, expected, monkeypatch, list(range(total)))


def _killed_at_moments(dense: Path, folder: Path, expected: dict[str, str], times: int) -> None:
    began = time.monotonic()
    assert killed(lambda: convexprune.prune(dense, output_dir=folder / "peace", **SETTINGS)) == 0
    duration = time.monotonic() - began
    for number in range(times):
        out, after = folder / f"killed-{number}", random.Random(number).uniform(0, duration)
        killed(lambda out=out: convexprune.prune(dense, output_dir=out, **SETTINGS), after)
        convexprune.prune(dense, output_dir=out, resume=True, **SETTINGS)
        assert checksums(out) == expected


def test_killed_at_random_moments(dense: Path, tmp_path: Path, expected: dict[str, str]):
    _killed_at_moments(dense, tmp_path, expected, 4)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(dense: Path, tmp_path: Path, expected: dict[str, str]):
    _killed_at_moments(dense, tmp_path, expected, 20)


def test_killed_again_and_again_it_still_gets_there(dense: Path, tmp_path: Path, expected, monkeypatch):
    """Each life survives 45 writes only; none of them begins from the start."""
    write, out, lives = files.write, tmp_path / "out", 0
    count = 0

    def deadly(file, data):
        nonlocal count
        count += 1
        if count > 45:
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, data)

    with monkeypatch.context() as patch:
        _patch_write(patch, deadly)
        while killed(lambda: convexprune.prune(dense, output_dir=out, resume=True, **SETTINGS)) != 0:
            lives += 1
            assert lives < 10
    assert lives > 1 and checksums(out) == expected


def test_two_processes_on_one_folder_are_one_too_many(dense: Path, stopped: Path, expected):
    with (
        locked(stopped / output.LOCK) as mine,
        pytest.raises(errors.OutputError, match=r"Another process works on.*process"),
    ):
        assert mine
        convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    convexprune.prune(dense, output_dir=stopped, resume=True, **SETTINGS)
    assert checksums(stopped) == expected


def test_a_rank_that_comes_while_another_tidies_up_waits_for_it(dense: Path, tmp_path: Path, expected, monkeypatch):
    out, tidied = tmp_path / "out", []
    convexprune.prune(dense, output_dir=out, **SETTINGS)

    def done(seconds: float) -> None:
        tidied.append(seconds)
        tidying.close()

    with contextlib.ExitStack() as tidying:
        assert tidying.enter_context(locked(out / output.LOCK))
        monkeypatch.setattr(output, "time", SimpleNamespace(sleep=done, monotonic=time.monotonic))
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert convexprune.prune(dense, output_dir=out, executor="ranks", **SETTINGS).report.operators
    assert tidied == [output.POLL] and checksums(out) == expected


def test_a_rank_that_opens_a_run_while_another_finishes_it_takes_it_as_finished(tmp_path: Path, monkeypatch):
    folder, tokens = output.RunFolder(tmp_path), {"calibration": TOKENS}
    with folder.opened({"a": 1}, tokens, 0):
        report = Report({}, {}, {}, identity={"a": 1})

    def finishing(path: Path):
        if path.name == output.RUN and folder.is_unfinished:
            folder.finish(report)
        return files.read_json(path)

    monkeypatch.setattr(output, "read_json", finishing)
    with folder.opened({"a": 1}, tokens, 1):
        assert folder.is_finished


def test_a_lock_goes_with_its_process(tmp_path: Path):
    def hold() -> None:
        with locked(tmp_path / "lock") as mine:
            (tmp_path / "held").write_text(str(mine))
            time.sleep(60)

    child = os.fork()
    if child == 0:
        hold()
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with locked(tmp_path / "lock") as mine:
        assert not mine
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "lock") as mine:
        assert mine


def test_another_folder_is_left_alone_even_when_resuming(dense: Path, tmp_path: Path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(errors.OutputError, match="already holds something"):
        convexprune.prune(dense, output_dir=tmp_path, resume=True, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_loaded_model_is_resumed_too_and_given_back_pruned(dense: Path, tmp_path: Path):
    def fresh():
        return AutoModelForCausalLM.from_pretrained(dense)

    whole = convexprune.prune(fresh(), output_dir=tmp_path / "peace", **SETTINGS)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(fresh(), output_dir=out, progress=stop_after(2), **SETTINGS)
    _flip(out / "work" / "hidden" / "00002.dense.bin")
    model = fresh()
    result = convexprune.prune(model, output_dir=out, resume=True, **SETTINGS)
    assert result.model is model
    assert checksums(out) == checksums(tmp_path / "peace")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name])
    assert result.report.environment["loading"] == "whole: it was given loaded"
    other = fresh()
    convexprune.prune(other, output_dir=out, resume=True, **SETTINGS)  # it is finished, and the model is still dense
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("file", ["hidden/00002.fed.bin", "hidden/*", "layers/00001.safetensors"])
def test_a_pruned_prefix_is_resumed_bit_for_bit(dense: Path, tmp_path: Path, file: str):
    settings: dict[str, Any] = SETTINGS | {"prefix": "pruned"}
    convexprune.prune(dense, output_dir=tmp_path / "peace", **settings)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, output_dir=out, progress=stop_after(2), **settings)
    for path in sorted((out / "work").glob(file)):
        _flip(path)
    convexprune.prune(dense, output_dir=out, resume=True, **settings)
    assert checksums(out) == checksums(tmp_path / "peace")


def test_text_that_the_model_samples_is_not_sampled_again(tmp_path: Path, monkeypatch):
    settings: dict[str, Any] = {
        "method": "magnitude", "num_calibration_samples": 2, "max_seq_length": 16, "evaluation": "self", "threads": 1,
    }  # fmt: skip
    monkeypatch.setattr("convexprune.request.EVALUATION_SAMPLES", 1)
    told = []

    def tell(report: OperatorReport) -> None:
        told.append(report)
        if len(told) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(output_dir=tmp_path / "out", progress=lambda _: tell, **settings)
    monkeypatch.setattr("convexprune.adapters.calibration.sampled_windows", lambda *_, **__: pytest.fail("sampled"))
    result = convexprune.prune(output_dir=tmp_path / "out", resume=True, **settings)
    assert set(result.report.perplexity) == {"dense", "pruned"}
    assert result.report.environment["loading"] == "layer by layer"


def test_differences_are_named_by_their_place():
    then, now = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "e": None, "d": [1, 2]}
    assert differences(then, now) == ["a.c: 2 then, 3 now", "d: [1] then, [1, 2] now"]


# Executors


def test_a_pool_gives_the_same_bits_even_if_it_loses_a_worker(dense: Path, tmp_path: Path, expected, monkeypatch):
    """The first worker is killed as soon as it holds a layer, and another takes that over."""
    workers, start = [], executors._Worker.__init__

    def watched(self, job, device):
        start(self, job, device)
        workers.append(self._process)

    lost, is_lost = [], executors._Worker.is_lost

    def killing(self):
        if not lost and list((tmp_path / "out" / "work" / "scratch").glob("*")):
            lost.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)
        return is_lost(self)

    monkeypatch.setattr(executors, "POLL", 0.01)
    monkeypatch.setattr(executors._Worker, "__init__", watched)
    monkeypatch.setattr(executors._Worker, "is_lost", killing)
    told = []
    result = convexprune.prune(
        dense, output_dir=tmp_path / "out", executor="pool", workers=2, progress=lambda _: told.append, **SETTINGS
    )
    assert lost and len(workers) == 3
    assert checksums(tmp_path / "out") == expected
    assert sorted(o.name for o in told) == sorted(o.name for o in result.report.operators)


def test_a_worker_whose_arithmetic_is_another_refuses(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = machine.has_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: not here)  # not in the worker, a process of its own
    with pytest.raises(errors.PruningError, match="the bits would differ"):
        convexprune.prune(dense, output_dir=tmp_path / "out", executor="pool", workers=2, **SETTINGS)


@pytest.mark.slow
def test_what_a_worker_raises_comes_out_of_the_pool(dense: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(broken, max_shard_size="40KB")
    with pytest.raises(errors.ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 of"):
        convexprune.prune(broken, output_dir=tmp_path / "out", executor="pool", workers=1, **SETTINGS)


def test_ranks_meet_in_the_folder_and_give_the_same_bits(dense: Path, tmp_path: Path, expected, monkeypatch):
    out = tmp_path / "out"

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "3"}
        time.sleep(0.05 * (3 - number) % 0.15)  # the first one comes last
        result = convexprune.prune(dense, output_dir=out, executor="ranks", **SETTINGS)
        assert len(result.report.operators) == 7 * LAYERS

    children = [forked(lambda number=number: rank(number)) for number in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert checksums(out) == expected
    assert not (out / "work").exists() and not (out / "run.lock").exists()


def test_ranks_that_load_the_model_themselves_all_end_with_it_pruned(dense: Path, tmp_path: Path, expected):
    def rank(number: int) -> None:
        os.environ |= {"SLURM_PROCID": str(number), "SLURM_NTASKS": "2"}
        model = AutoModelForCausalLM.from_pretrained(dense)
        convexprune.prune(model, output_dir=tmp_path / "out", executor="ranks", **SETTINGS)
        model.save_pretrained(tmp_path / f"rank-{number}")

    os.environ.pop("RANK", None)
    children = [forked(lambda number=number: rank(number)) for number in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    one, two, out = (checksums(tmp_path / name) for name in ("rank-0", "rank-1", "out"))
    assert one == two == out


def test_a_lost_rank_is_made_up_for(dense: Path, tmp_path: Path, expected, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    killed(lambda: convexprune.prune(dense, output_dir=out, executor="ranks", progress=_die, **SETTINGS))
    assert (out / "run.json").exists()
    monkeypatch.setenv("RANK", "1")
    convexprune.prune(dense, output_dir=out, executor="ranks", **SETTINGS)
    assert checksums(out) == expected


def _die(_: int) -> Callable[[OperatorReport], None]:
    return lambda report: os.kill(os.getpid(), signal.SIGKILL) if ".layers.1." in report.name else None


@pytest.mark.slow
def test_torchrun_gives_the_same_bits(dense: Path, tmp_path: Path, expected: dict[str, str]):
    torch.save(TOKENS, tmp_path / "tokens.pt")
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, convexprune\n"
        f"settings = { ({k: v for k, v in SETTINGS.items() if k != 'dataset'})!r}\n"
        f"tokens = torch.load({str(tmp_path / 'tokens.pt')!r})\n"
        f"convexprune.prune({str(dense)!r}, dataset=tokens, output_dir={str(tmp_path / 'out')!r}, "
        "executor='ranks', **settings)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, check=True, capture_output=True)
    assert checksums(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_same_bits(dense: Path, tmp_path: Path, expected: dict[str, str]):
    ray = pytest.importorskip("ray")
    try:
        convexprune.prune(dense, output_dir=tmp_path / "out", executor="ray", workers=2, **SETTINGS)
    finally:
        ray.shutdown()
    assert checksums(tmp_path / "out") == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"executor": "pol"}, "Unknown executor 'pol'. Did you mean 'pool'"),
    "no folder": ({"executor": "pool", "output_dir": None}, "meet in the output folder"),
    "sequential": ({"executor": "pool", "prefix": "pruned"}, "waits for the one before it"),
    "no launcher": ({"executor": "ranks"}, "RANK or SLURM_PROCID is not set"),
    "no threads": ({"threads": 0}, "threads=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_spread_is_refused(dense: Path, tmp_path: Path, case: str, monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    settings, message = REFUSED[case]
    with pytest.raises(errors.RecipeError, match=message):
        given: dict[str, Any] = {"output_dir": tmp_path / "out", **SETTINGS, **settings}
        convexprune.prune(dense, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_model_cannot_be_opened_by_others(dense: Path, tmp_path: Path):
    with pytest.raises(errors.RecipeError, match="cannot open a model that is loaded"):
        model = AutoModelForCausalLM.from_pretrained(dense)
        convexprune.prune(model, output_dir=tmp_path / "out", executor="pool", **SETTINGS)


def test_ray_is_asked_for_with_the_command_that_installs_it(dense: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(executors, "find_spec", lambda _: None)
    with pytest.raises(errors.DependencyError, match=r"pip install 'convexprune\[ray\]'"):
        convexprune.prune(dense, output_dir=tmp_path / "out", executor="ray", **SETTINGS)
