"""Tasks of lm-eval: scored as by hand, by `evaluate` and for each variant of a comparison."""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from door import TOKENS
from test_cli import folder
from test_evaluate import pair
from transformers import AutoModelForCausalLM, AutoTokenizer

import convexprune
from convexprune import errors
from convexprune.validation import _evaluate as module
from convexprune.validation import compare
from convexprune.validation._results import tasks_result

__all__ = ["folder", "pair"]  # fixtures of other files

ITEMS = [
    ("The cat sat on the mat.", "The cat sat on the xq."),
    ("It was the best of times.", "It was best times the of."),
]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with tasks of lm-eval: `pairs`, the likelier of two sentences, and `prose`, the bits of good ones."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"good": good, "bad": bad} for good, bad in ITEMS * 3]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data_files": {"train": str(tmp_path / "items.jsonl")}}
    own: dict[str, dict[str, Any]] = {
        "pairs": {"output_type": "multiple_choice", "doc_to_target": 0, "doc_to_choice": "{{[good, bad]}}"},
        "prose": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{good}}"},
    }
    for (name, task), metric in zip(own.items(), ("acc", "bits_per_byte"), strict=True):
        task |= {"task": name, "dataset_path": "json", "dataset_kwargs": files, "validation_split": "train"}
        task |= {"doc_to_text": "", "num_fewshot": 0, "metric_list": [{"metric": metric}]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    both = {"group": "both", "task": ["pairs", "again"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(both))
    again = own["pairs"] | {"task": "again", "doc_to_target": 1}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    lost = own["pairs"] | {"task": "lost", "dataset_kwargs": {"data_files": {"train": "not-there.jsonl"}}}
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(lost))
    return tmp_path


def test_tasks_are_scored_as_by_hand(pair: tuple[Path, Path, Path], tasks: Path):
    dense, other, _ = pair
    found = convexprune.evaluate(other, against=dense, tasks=["pairs"], tasks_dir=tasks)
    (score,) = found.tasks
    expected = [sum(_likelier(model, *pair) for pair in ITEMS) / len(ITEMS) for model in (other, dense)]
    assert [score.value, score.dense] == expected and score.items == 6 and score.error is not None
    with pytest.raises(errors.RecipeError, match=r"Unknown task 'pair'\. Did you mean pairs"):
        convexprune.evaluate(other, tasks="pair", tasks_dir=tasks)
    assert import_module("lm_eval") is not None and len(list(found.tables())) == 1


def test_a_comparison_scores_tasks_of_each_pruned_model(pair: tuple[Path, Path, Path], tasks: Path):
    """A row's scores are those of the folder that `prune` writes, and no row is another one for them."""
    dense, _, text = pair
    asked: dict[str, Any] = {"dataset": TOKENS, "num_calibration_samples": 4, "held_out_samples": 0}
    settings: dict[str, Any] = asked | {
        "methods": ["sparsegpt", "magnitude"], "sparsities": [0.9], "conventions": ["pruned-own"],
        "eval_texts": [str(text)], "eval_window": 16, "eval_windows": 2, "plots": False,
    }  # fmt: skip
    result = compare(dense, **settings, output=tasks / "with", tasks=["pairs", "prose"], tasks_dir=tasks, limit=4)
    rows, card = result["rows"], result["card"]
    assert card["tasks"] == ("pairs", "prose") and card["items of a task"] == 4
    own = {"prefix": "pruned", "error_correction": 0.0, "error_target": "operator", "allocation": "uniform"}
    for method, found in ({None: result["dense"]} | {row["method"]: row for row in rows}).items():
        model = dense if method is None else tasks / method
        if method is not None:
            convexprune.prune(dense, method=method, sparsity=0.9, output_dir=model, dtype="float32", **asked, **own)
        scores = convexprune.evaluate(model, tasks=["pairs", "prose"], tasks_dir=tasks, limit=4, dtype="float32").tasks
        assert found["tasks"] == [*map(asdict, scores)] and found["accuracy"] == scores[0].value
    assert len({found["tasks"][1]["value"] for found in (result["dense"], *rows)}) == 3
    plain = compare(dense, **settings, output=tasks / "without")
    assert [row["texts"] for row in plain["rows"]] == [row["texts"] for row in rows]
    assert plain["dense"]["accuracy"] is None and "tasks" not in plain["card"]
    head, *lines = [line for line in (tasks / "with" / "report.md").read_text().splitlines() if line.startswith("| ")]
    shown = [cells[head.split(" | ").index("tasks")] for cells in (line.split(" | ") for line in lines[1:])]
    assert shown == [f"{found['accuracy']:.2%}" for found in (result["dense"], *rows)]
    assert "| tasks |" not in (tasks / "without" / "report.md").read_text()


def test_a_group_of_tasks_counts_once_and_nothing_is_said_outside_a_checkout(
    pair: tuple[Path, Path, Path], tasks: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """`both` is the mean of `pairs` and of its opposite `again`; beside another task it is one of two."""
    monkeypatch.chdir(tasks)  # lm-eval asks git for a checkout, and git complains where there is none
    scores = convexprune.evaluate(pair[1], tasks=["both"], tasks_dir=tasks, limit=3).tasks
    values = {score.task: score.value for score in scores if score.metric == "acc"}
    assert values["pairs"] + values["again"] == 1 and values["both"] == 0.5
    assert {score.task: score.part_of for score in scores} == {"both": None, "pairs": "both", "again": "both"}
    others = [asdict(scores[0]) | {"task": "other", "part_of": None, "value": 1.0}]
    assert tasks_result([*map(asdict, scores), *others])["accuracy"] == 0.75
    assert "git" not in capfd.readouterr().err


@pytest.mark.parametrize(("names", "said"), [(["lost"], "not-there.jsonl"), (["both", "pairs"], "[Dd]uplicate")])
def test_tasks_that_cannot_be_loaded_are_refused(
    pair: tuple[Path, Path, Path], tasks: Path, names: list[str], said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "load", None)  # nothing is loaded before
    with pytest.raises(errors.RecipeError, match=f"Tasks {', '.join(names)} cannot be loaded: (.|\n)*{said}"):
        convexprune.evaluate(pair[1], tasks=names, tasks_dir=tasks)


def _likelier(model: Path, good: str, bad: str) -> bool:
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def score(text: str) -> float:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        begun = torch.cat([torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id]]), ids], 1)
        with torch.no_grad():
            return network(begun[:, :-1]).logits.log_softmax(-1).gather(-1, ids[..., None]).sum().item()

    return score(good) > score(bad)
