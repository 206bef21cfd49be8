"""The one loop over decoder layers: what a step is given, in which order, and that no other loop runs layers."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_families import TOKENS, build_family

import convexprune
from convexprune._layerwise.context import LayerContext, propagate
from convexprune._layerwise.folder_store import FolderStore
from convexprune._layerwise.store import MemoryStore
from convexprune._layerwise.walk import LayerWalk
from convexprune._storage.batches import Batches
from convexprune.adapters import HuggingFaceModel

PRODUCT = Path(convexprune.__file__).parent
LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
MODULES = [path for room in ("", "adapters", "validation") for path in sorted((PRODUCT / room).rglob("*.py"))]


@pytest.fixture(scope="module")
def llama() -> HuggingFaceModel:
    return HuggingFaceModel(build_family("llama").eval())


def outputs_of(model: HuggingFaceModel) -> list[torch.Tensor]:
    """What leaves the last layer, by the model itself."""
    own: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        own.append(output)

    hook = model.layers[-1].module.register_forward_hook(keep)
    for batch in TOKENS.split(2):
        model.forward(batch)
    hook.remove()
    return own


def test_a_walk_is_the_model_and_its_way_back_has_what_entered(llama: HuggingFaceModel, tmp_path: Path):
    entered, told, files = list[list[torch.Tensor]](), list[str](), iter(range(100))
    states = MemoryStore(range(2), lambda: Batches(tmp_path / f"{next(files)}.bin"), keep=True)

    def step(context: LayerContext) -> None:
        entered.append(list(context.inputs["dense"]))
        propagate(context)

    LayerWalk(llama, TOKENS.split(2), states, on_layer=told.append).run(step)
    assert all(torch.equal(*pair) for pair in zip(states.take(2), outputs_of(llama), strict=True))
    assert told == [layer.name for layer in llama.layers]
    back = list[int]()

    def step_back(context: LayerContext) -> None:
        pairs = zip(context.inputs["dense"], entered[context.number], strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        context.record().append(torch.ones(1))  # handed on to nobody
        back.append(context.number)

    LayerWalk(llama, TOKENS.split(2), states.backward()).run(step_back)
    assert back == [1, 0] and list(tmp_path.iterdir()) == []


def test_what_enters_a_layer_and_is_lost_is_computed_again(llama: HuggingFaceModel, tmp_path: Path):
    def entering(store: FolderStore) -> torch.Tensor:
        found = list[torch.Tensor]()
        LayerWalk(llama, TOKENS.split(2), store).visit(1, lambda context: found.extend(context.inputs["dense"]))
        return torch.cat(found)

    store = FolderStore(tmp_path, 2)
    LayerWalk(llama, TOKENS.split(2), store).visit(0, propagate)
    kept = entering(store)
    store.finish(0, llama.state(llama.layers[0]), [])
    for path in (tmp_path / "hidden").iterdir():
        path.unlink()
    assert torch.equal(entering(FolderStore(tmp_path, 2)), kept)


def running_loops(tree: ast.AST) -> Iterator[ast.AST]:
    """Loops that make something resident, or go over `layers` and call a layer's module."""
    for loop in (node for node in ast.walk(tree) if isinstance(node, LOOPS)):
        inside = list(ast.walk(loop))
        calls = [node for node in inside if isinstance(node, ast.Call) and ast.unparse(node.func) != "signature"]
        functions = [call.func for call in calls if isinstance(call.func, ast.Attribute)]
        resident = any(function.attr == "resident" for function in functions)
        given = [argument for call in calls for argument in call.args]
        modules = [node for node in (*functions, *given) if isinstance(node, ast.Attribute) and node.attr == "module"]
        runs = any(re.search(r"\blayer$|layers\[.*\]$", ast.unparse(node.value)) for node in modules)
        over_layers = any(isinstance(node, ast.Attribute) and node.attr.endswith("layers") for node in inside)
        if resident or (runs and over_layers):
            yield loop


def test_there_is_one_loop_over_decoder_layers():
    found = {path.relative_to(PRODUCT).as_posix(): list(running_loops(ast.parse(path.read_text()))) for path in MODULES}
    assert {name: [ast.unparse(loop) for loop in loops] for name, loops in found.items() if loops} == {}
    resident = [path for path in MODULES for _ in range(path.read_text().count(".resident(layer), "))]
    assert [path.name for path in resident] == ["walk.py"]


@pytest.mark.parametrize(
    "loop",
    [
        "for number, layer in enumerate(model.layers):\n    hidden = [call(layer.module, x) for x in hidden]",
        "for number in range(len(self._model.layers)):\n    observe(self._model.layers[number].module, x)",
        "for layer, call in zip(model.layers, calls):\n    with model.resident(layer):\n        look(layer)",
        "found = [call(layer.module, x) for layer in model.layers]",
    ],
)
def test_another_loop_over_decoder_layers_is_found(loop: str):
    assert list(running_loops(ast.parse(loop)))
