"""What a method needs is what it does, counted; and the arithmetic of seconds by hand."""

from dataclasses import replace

import pytest
import torch
from counting import Counted

from convexprune._doctor.answers import Group
from convexprune._doctor.check import Bed
from convexprune._runs import resources, speed
from convexprune._runs.resources import NEEDS, Card, Needs, binding, needs_of, seconds_by_resource
from convexprune._runs.sizes import METHODS, LayerSize, ModelSize, Setting, Stack
from convexprune._runs.speed import measured_card
from convexprune.adapters._discovery import inspection, needs
from convexprune.constraints import Unstructured
from convexprune.pruners import PRUNERS

SHAPE = (48, 80)


class Spent(Counted):
    """Counts float64 products, too."""

    def __init__(self) -> None:
        super().__init__(SHAPE[0] * SHAPE[1], compiled=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("addmm") and args[0].dtype == torch.float64:
            self.counts["precise"] += 1
        if func.__name__.startswith("linalg_solve_triangular") and args[0].dtype == torch.float64:
            self.counts["precise"] += 0.5  # pyright: ignore[reportArgumentType]
        if func.__name__.startswith("mm") and args[0].dtype == torch.bfloat16:
            self.counts["steps"] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["convex"])
def test_what_a_method_needs_is_what_it_does(name: str):
    problem = Group(Bed("cpu", group=SHAPE)).problem(Unstructured(0.5), "cpu", torch.float32)
    _ = problem.quadratic, problem.energy
    with Spent() as spent:
        PRUNERS[name]().prune(problem)
    assert spent.counts["precise"] == NEEDS[name].precise
    assert spent.counts["dispatched"] == pytest.approx(NEEDS[name].launches, rel=0.25)
    assert spent.counts["passes"] == pytest.approx(NEEDS[name].passes, rel=0.25)


def test_every_method_has_needs():
    assert NEEDS.keys() == METHODS.keys()


MODEL = ModelSize((LayerSize(((Stack(("q",), (8,), 4),), (Stack(("o",), (4,), 8),)), 64, 32, 2),), 10, 10, 4, 2)
CARD = Card("a card", 1.0, 10.0, 100.0, 1000.0, 500.0)


def test_seconds_by_hand():
    setting = Setting(3, 1, 5, 1, METHODS["convex"]._replace(products=7, factorisations=2), correction=False)
    found = seconds_by_resource(MODEL, setting, Needs(4, 1, 0.5, 6, 3, 0), CARD)
    whole, cubes, entries, squares = 2 * (8 * 4**2 + 4 * 8**2), 4**3 + 8**3, 8 * 4 + 4 * 8, 4**2 + 8**2
    assert found["gram"] == {"bfloat16": pytest.approx(2 * 20 * squares / 100)}
    assert found["solve"] == {
        "bfloat16": pytest.approx(2 * whole * (4 + 3 * 3) / 100),
        "float32": pytest.approx(2 * 2 * cubes / 10),
        "float64": pytest.approx(2 * (whole + cubes / 2)),
        "memory": pytest.approx(2 * 4 * (6 * entries + 3 * squares) / 1000),
        "launches": 0,
    }
    assert found["errors"] == {"float32": pytest.approx(2 * 4 * whole / 10)}
    assert found["copies"] == {"link": pytest.approx(2 * 2 * (20 * 2 * (4 + 4 + 8) + 2 * 64) / 500)}
    assert binding(found) == "float64"


def test_many_small_problems_wait_for_the_host():
    setting = Setting(3, 1, 5, 1, METHODS["convex"], correction=False)
    quick = Card("a card", *(1e15,) * 5)
    found = seconds_by_resource(MODEL, setting, NEEDS["convex"], quick)
    begun = resources.LAUNCH * (NEEDS["convex"].launches + resources.AROUND)
    assert found["solve"]["launches"] == pytest.approx(4 * begun, rel=1e-3)
    assert binding(found) == "launches"


def test_problems_side_by_side_share_what_the_host_begins():
    expert = Stack(("e",), (8,), 4, token_aligned=False)
    stage = (Stack(("o",), (4,), 8), *[expert] * 10)
    model = ModelSize((LayerSize((stage,), 64, 32, 2),), 10, 10, 4, 2)
    alone = Setting(3, 1, 5, 1, METHODS["convex"], correction=False)
    together, needs = replace(alone, side_by_side=True), NEEDS["convex"]
    assert (together.together(expert, stage), together.together(stage[0], stage)) == (10, 1)
    quick, own = Card("a card", *(1e15,) * 5), needs.own + resources.AROUND
    saved = 2 * 10 * resources.LAUNCH * (needs.launches - needs.own) * (1 - 1 / 10)
    spent = [seconds_by_resource(model, each, needs, quick)["solve"]["launches"] for each in (alone, together)]
    assert spent[0] - spent[1] == pytest.approx(saved, rel=1e-3)
    assert spent[1] == pytest.approx(2 * resources.LAUNCH * (11 * own + 2 * (needs.launches - needs.own)), rel=1e-3)


def launched(count: int) -> int:
    problems = [Group(Bed("cpu", group=SHAPE)).problem(Unstructured(0.5), "cpu", torch.float32) for _ in range(count)]
    for problem in problems:
        _ = problem.quadratic, problem.energy
    with Spent() as spent:
        PRUNERS["convex"]().prune_all(problems)
    return spent.counts["dispatched"]


def test_many_problems_need_what_the_formula_says():
    needs = NEEDS["convex"]
    for count in (4, 8):
        assert launched(count) == pytest.approx(needs.launches - needs.own + count * needs.own, rel=0.25)


def test_inspect_on_a_gpu_says_what_binds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "WIDTH", 32)
    monkeypatch.setattr(speed, "SECONDS", 0.001)
    monkeypatch.setattr(speed, "PAUSE", 0)
    card = measured_card("cpu", torch.float32)
    assert min(card.float64, card.float32, card.bfloat16, card.memory, card.link) > 0
    monkeypatch.setattr(inspection, "default_device", lambda _: "cuda")
    monkeypatch.setattr(needs, "measured_card", lambda *_: CARD)
    found = inspection.inspect(device_memory="80GB", num_calibration_samples=2)
    assert list(found.seconds) == ["forward", "gram", "solve", "errors", "copies"]
    assert found.notes[-1].startswith("On a card most of the time goes to ")


def test_a_refit_is_added():
    assert needs_of("wanda", True).passes == NEEDS["wanda"].passes + resources.REFIT.passes
    assert needs_of("wanda", False) == NEEDS["wanda"]
