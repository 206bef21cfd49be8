"""Verify: agrees on a right answer, says what is wrong with a wrong one, and reads a finished run again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from brute_force import best_pruning
from safetensors.torch import load_file, save_file
from test_cli import folder, run

import convexprune
from convexprune.constraints import SemiStructured
from convexprune.core._problem import Problem
from convexprune.errors import OutputError, ProblemError, RecipeError
from convexprune.pruners import LayerProblem
from convexprune.report import Report
from convexprune.solvers import Status
from convexprune.solvers._cg import ConjugateGradient
from convexprune.solvers._fista import FISTA
from convexprune.validation import Verification, verify
from convexprune.validation._layer_problems import Solve, SolvedProblem, block, block_problems, solve_by_all

__all__ = ["folder"]  # a fixture of test_cli

OPERATOR = "model.decoder.layers.1.self_attn.v_proj"
SMALL: dict[str, Any] = {"rows": 2, "columns": 8, "bound_rows": 2, "operators": [OPERATOR]}
TOKENS: dict[str, Any] = {"num_calibration_samples": 8, "max_seq_length": 32}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_fresh_model_passes(folder: Path, pattern):
    result = verify(folder / "model", dataset=str(folder / "text.txt"), pattern=pattern, **SMALL, **TOKENS)
    assert result.passed, result.faults
    assert [c.penalty for c in result.comparisons] == ["L1", "support"]
    assert all(s.difference <= 1e-6 for c in result.comparisons for s in c.solves[1:])
    (bound,) = result.bounds
    assert bound.operator == OPERATOR and bound.damping > 0
    assert bound.ratio > bound.plain_ratio >= 0  # the damped problem is better conditioned, and the one that was solved
    assert json.loads(result.to_json())["passed"] is True


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("prefix", ["dense", "pruned"])
def test_a_finished_run_is_read_again_and_judged_by_its_own_weights(folder: Path, pattern: str, prefix: str):
    operators = [OPERATOR, OPERATOR.replace("v_", "k_"), "model.decoder.layers.1.fc2"]
    text = str(folder / "text.txt")
    settings: dict[str, Any] = {"dataset": text, "pattern": pattern, "allocation": "uniform", "prefix": prefix} | TOKENS
    convexprune.prune(folder / "model", output_dir=folder / "out", **settings)
    result = verify(folder / "out", rows=1, columns=8, bound_rows=1, operators=operators)
    assert result.passed, result.faults
    again = verify(folder / "model", rows=1, columns=8, bound_rows=1, operators=operators, **settings)
    report = Report.from_json((folder / "out" / "report.json").read_text())
    damping = {o.name: o.damping and o.damping.strength for o in report.operators}
    for judged, fresh in zip(result.bounds, again.bounds, strict=True):
        assert judged.operator == fresh.operator and judged.damping == damping[judged.operator]
        assert fresh.plain_error == pytest.approx(judged.plain_error, rel=1e-4)
    assert {judged.operator for judged in result.bounds} == {*operators}


def test_weights_that_break_their_pattern_are_noticed(folder: Path):
    text = str(folder / "text.txt")
    convexprune.prune(folder / "model", output_dir=folder / "out", dataset=text, pattern="2:4", **TOKENS)
    file = folder / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{OPERATOR}.weight"].fill_(1.0)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OutputError, match=r"model\.safetensors is damaged, by the checksums in report\.json"):
        verify(folder / "out", **SMALL)


def test_a_solver_that_is_wrong_fails_the_verdict_and_the_command(folder: Path, monkeypatch):
    solve = FISTA.solve

    def halved(self, problem, start=None):
        solution = solve(self, problem, start)
        wrong = solution.weight / 2
        certificate = convexprune.certify(problem, wrong)
        return convexprune.Solution(wrong, solution.status, certificate, 1, 1, 0.0)

    options = ["--dataset", folder / "text.txt", "--nsamples", 8, "--seqlen", 32, "--rows", 2, "--columns", 8]
    arguments = ["verify", folder / "model", "--operators", OPERATOR, *options]
    good = run(*arguments)
    assert good.exit_code == 0, good.output
    assert "passed" in good.output and "lower bound" in good.output and "median bound" in good.output
    whole = run(*arguments, "--pattern", "columns", "--sparsity", 0.5)
    assert whole.exit_code == 0, whole.output
    assert "passed" in whole.output and "median bound" in whole.output and "nan" not in whole.output
    monkeypatch.setattr(FISTA, "solve", halved)
    bad = run(*arguments, "--method", "wanda")
    assert bad.exit_code == 1
    assert "missed" in bad.output and "fista" in bad.output
    as_json = run(*arguments, "--method", "wanda", "--prefix", "pruned", "--json")
    assert as_json.exit_code == 1
    found = json.loads(as_json.stdout)
    assert found["passed"] is False and found["settings"]["prefix"] == "pruned"


def test_a_verification_of_nothing_fails_and_says_so():
    nothing = Verification("a model", {}, 1e-6, 1e-4)
    assert not nothing.passed and nothing.faults
    assert json.loads(nothing.to_json())["median_ratio"] == "nan"


def test_settings_beside_a_run_and_unknown_operators_are_refused(folder: Path):
    (folder / "model" / "recipe.yaml").write_text("model: x\n")
    with pytest.raises(RecipeError, match="its own recipe; leave out: pattern"):
        verify(folder / "model", pattern="2:4")
    (folder / "model" / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match="is for the folder of a run"):
        verify(folder / "model", model="x")
    with pytest.raises(RecipeError, match="Unknown operator"):
        verify(folder / "model", operators=["model.decoder.layers.9.fc1"], dataset=str(folder / "text.txt"))
    with pytest.raises(RecipeError, match="not a regular expression"):
        verify(folder / "model", operators=["re:("], dataset=str(folder / "text.txt"))


def test_operators_are_named_by_a_regular_expression(folder: Path):
    asked = {"rows": 1, "columns": 4, "bound_rows": 1, "operators": [r"re:model.decoder.layers.1.*\.(q|v)_proj"]}
    result = verify(folder / "model", dataset=str(folder / "text.txt"), **asked, **TOKENS)
    assert [b.operator[-6:] for b in result.bounds] == ["q_proj", "v_proj"]


def test_a_block_moves_only_its_columns():
    from strategies import make_layer

    layer = make_layer("full rank", 3, 8, 0)
    problem = LayerProblem(layer.weight, layer.moments, SemiStructured(2, 4))
    quadratic, chosen = block(problem, 4, torch.Generator().manual_seed(0))
    assert chosen.tolist() in ([0, 1, 2, 3], [4, 5, 6, 7])  # whole groups
    moved = layer.weight.clone()
    moved[:, chosen] = 0
    zero = torch.zeros(3, 4, dtype=torch.float64)
    torch.testing.assert_close(quadratic.values(zero), problem.quadratic.values(moved))


def few_tokens(tokens: int, kept: float) -> dict[str, Problem]:
    """The problems of a block on fewer tokens than inputs."""
    from strategies import make_layer

    layer = make_layer("full rank", 4, 32, 1, change=0.0, tokens=tokens, mixing=0.2)
    problem = LayerProblem(layer.weight, layer.moments, SemiStructured(2, 4))
    scores = torch.rand(4, 32, generator=torch.Generator().manual_seed(2))
    return block_problems(problem.quadratic, problem, scores < kept)


@pytest.mark.parametrize(("tokens", "kept"), [(14, 0.5), (25, 0.5), (14, 0.8)])
def test_nothing_is_wrong_on_fewer_tokens_than_inputs(tokens: int, kept: float):
    # Entries next to free, and at (14, .8) targets that are fitted exactly: what is left of the objective is rounding.
    for penalty, problem in few_tokens(tokens, kept).items():
        solved = solve_by_all("block", penalty, problem)
        assert not list(solved.faults(1e-6, 1e-4)), solved


def test_what_is_wrong_at_an_exact_fit_is_said(monkeypatch):
    problem = few_tokens(14, 0.8)["support"]
    solve = ConjugateGradient.solve

    def off(self, problem, start=None):
        wrong = solve(self, problem, start).weight * (1 + 1e-6)
        return convexprune.Solution(wrong, Status.SOLVED, convexprune.certify(problem, wrong), 1, 1, 0.0)

    monkeypatch.setattr(ConjugateGradient, "solve", off)
    faults = list(solve_by_all("block", "support", problem).faults(1e-6, 1e-4))
    assert len(faults) == 2 and all(fault.startswith("cg") for fault in faults)


def test_an_oracle_that_ends_early_is_no_fault_unless_all_do():
    def solved(*differences: float) -> list[str]:
        names = ("cg", "cg, 1e-8", "Clarabel", "OSQP", "scipy")
        solves = (Solve(name, 1.0, d, 0.0, 0.0, 0.0) for name, d in zip(names, differences, strict=True))
        return list(SolvedProblem("block", "support", 1, 1, tuple(solves)).faults(1e-6, 1e-4))

    assert not solved(1e-5, 0, 1e-9, 1e-3, float("nan"))
    assert solved(0, 2e-6, 1e-9, 0, 0) == ["cg, 1e-8: the objective is 2.0e-06 above the least"]
    assert solved(0, 0, 3e-6, 1e-3, 2e-6) == ["no oracle confirms the least objective: scipy is 2.0e-06 above"]


def test_brute_force_refuses_what_is_too_large():
    from strategies import make_layer

    layer = make_layer("full rank", 1, 24, 0)
    with pytest.raises(ProblemError, match="at most 20"):
        best_pruning(LayerProblem(layer.weight, layer.moments, SemiStructured(2, 4)))
