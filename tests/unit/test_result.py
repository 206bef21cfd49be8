"""A result is opened and counted before what it was made of goes, and is handed back only as it was written."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import SETTINGS, checksums, cut, empty, flip
from safetensors.torch import load_file, save_file
from tiny_families import SMALL, build_family
from torch import Tensor

import convexprune
from convexprune import errors
from convexprune.adapters._checkpoints.shards import Shards
from convexprune.adapters._saving import saving
from convexprune.report import OperatorReport, Report


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    folder.mkdir()
    convexprune.prune(dense, output_dir=folder, **SETTINGS)
    return folder


def _zeroed(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_report_has_the_checksum_of_every_file_of_the_result(finished: Path):
    files = Report.from_json((finished / "report.json").read_text()).files
    others = ("report.json", "README.md", "report.html")  # the last two are made of the first, for people
    assert files == {path.name: _sha256(path) for path in finished.iterdir() if path.name not in others}


@pytest.mark.parametrize("name", ["model-00001-of-*.safetensors", "config.json", "recipe.yaml", "report.json"])
@pytest.mark.parametrize("damage", [flip, cut, empty, _zeroed, Path.unlink])
def test_a_finished_run_is_handed_back_only_as_it_was_written(dense: Path, finished: Path, name: str, damage):
    (path,) = finished.glob(name)
    kept = path.read_bytes()
    damage(path)
    wrong = "is missing" if damage == Path.unlink else "is damaged"
    if (path.name, damage) == ("report.json", Path.unlink):
        wrong = "already holds something"  # nothing there says that it was a run
    try:
        with pytest.raises(errors.OutputError, match=f"{path.name} {wrong}" if "holds" not in wrong else wrong):
            convexprune.prune(dense, output_dir=finished, resume=True, **SETTINGS)
    finally:
        path.write_bytes(kept)


def test_what_others_put_beside_a_result_is_not_looked_at(dense: Path, finished: Path):
    (finished / "notes.md").write_text("mine")
    assert convexprune.prune(dense, output_dir=finished, resume=True, **SETTINGS).report.files


def test_a_finished_run_says_that_it_evaluates_nothing_more(dense: Path, finished: Path, caplog):
    convexprune.prune(dense, output_dir=finished, resume=True, evaluation=SETTINGS["dataset"], **SETTINGS)
    assert "is finished, and its report is of the text None: Tensor given by the caller is not evaluated" in caplog.text


def _without(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _dense_again(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] += 1


def _rounded(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].bfloat16()


FAULTS: list[tuple[Callable[[dict[str, Tensor], str], None], str]] = [
    (_without, r"q_proj.weight should be .* and is None"),
    (_dense_again, r"q_proj: it has 0 zeros, and the report says 128"),
    (_rounded, r"q_proj.weight should be .*'F32'.* and is .*'BF16'"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_result_that_is_not_what_was_pruned_is_noticed_while_the_layers_are_there(
    dense: Path, tmp_path: Path, expected, monkeypatch, fault, message: str
):
    assemble = Shards.assemble

    def faulty(self: Shards, target: Path, *rest: Any) -> None:
        assemble(self, target, *rest)
        name = "model.layers.2.self_attn.q_proj.weight"
        path = next(path for path in target.glob("*.safetensors") if name in load_file(path))
        tensors = load_file(path)
        fault(tensors, name)
        save_file(tensors, path, {"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "assemble", faulty)
        with pytest.raises(errors.OutputError, match=rf"not the pruned model: .*{message}.*--resume"):
            convexprune.prune(dense, output_dir=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out" / "report.json").exists()
    convexprune.prune(dense, output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert checksums(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("family", "tensor", "message"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", "should be .* and is"),
        ("llama", "model.norm.weight", "should be .* and is"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.1.w1.weight", "numbers, .* of them 0"),  # fused in memory
    ],
)
def test_so_is_that_of_a_model_that_was_loaded_whole(tmp_path: Path, monkeypatch, family, tensor: str, message: str):
    save = saving.save

    def faulty(model: Any, folder: Path) -> None:
        save(model, folder)
        (path,) = folder.glob("*.safetensors")
        tensors = load_file(path)
        tensors[tensor].fill_(0)
        save_file(tensors, path, {"format": "pt"})

    monkeypatch.setattr(saving, "save", faulty)
    with pytest.raises(errors.OutputError, match=f"not the pruned model: .*{message}"):
        convexprune.prune(build_family(family), output_dir=tmp_path / "out", method="magnitude", **SMALL)


def _signed(report: dict[str, Any]) -> str:
    text = hashlib.sha256(json.dumps(report).encode()).hexdigest()
    return json.dumps(report | {"checksum": text})


OPERATOR = OperatorReport(
    "a", 2, 3, 1, 1, "x", float("nan"), None, float("inf"), None, None, "SOLVED", 1, 2, {"n": 3, "d": float("inf")},
    1, 0, 1.5, {"rows": 2, "ratio": 0.5},
)  # fmt: skip
REPORT = Report(
    {"method": "convex", "method_args": {"a": [1, None]}}, {"head": "tied"}, {"threads": 1}, [OPERATOR], {"prune": 1.5},
    {"dense": {"value": float("inf"), "windows": 3}}, {"cost": None, "gap": 0.1}, {"code": "1"}, {"a.json": "0"},
)  # fmt: skip


def test_a_report_comes_back_as_it_was_written():
    again = Report.from_json(REPORT.to_json())
    assert again.to_json() == REPORT.to_json()
    assert again.operators[0].gap == float("inf") and again.operators[0].facts == OPERATOR.facts
    assert repr(again) == repr(REPORT)  # NaN, and what is an integer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"), ("{}", "KeyError"), ("[]", "TypeError"), ("null", "AttributeError"),
        ("[" * 100_000, "RecursionError"), ('{"a":' * 100_000, "RecursionError"),
        ('{"a":' + "9" * 5000 + "}", "digits"), (REPORT.to_json()[:-30], "JSONDecodeError"),
        (REPORT.to_json().replace('"zeros": 1', '"zeros": 2'), "checksum"),
        (_signed({"recipe": {}}), "left_alone: Field required"),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_report_is_refused(text: str, reason: str):
    with pytest.raises(
        errors.OutputError, match=f"out/report.json is damaged, or of another release.*{reason}"
    ) as told:
        Report.from_json(text, "out/report.json")
    assert len(str(told.value)) < 400


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"surprise": 1}, "surprise: Unexpected"), ({"operators": 5}, "operators: Input"),
        ({"files": {"a": 1}}, "files.a"), ({"operators": [{}]}, "operators.0.name: Field required"),
        ({"seconds": {"a": "soon"}}, "seconds.a"),
    ],
)  # fmt: skip
def test_so_is_one_of_another_structure(change: dict[str, Any], reason: str):
    whole = {name: value for name, value in json.loads(REPORT.to_json()).items() if name != "checksum"}
    with pytest.raises(errors.OutputError, match=reason):
        Report.from_json(_signed(whole | change))
