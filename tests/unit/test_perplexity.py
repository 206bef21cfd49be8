import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convexprune._layerwise.folder_store import FolderStore
from convexprune.adapters import EMBEDDED, HuggingFaceModel, load, save, text_windows
from convexprune.adapters._data.likelihood import last_states, likelihoods, of_states
from convexprune.errors import CalibrationError
from convexprune.validation import Perplexity, perplexity
from convexprune.validation._perplexity import fit

WINDOWS = torch.arange(5 * 32).reshape(5, 32) * 37 % 4096
LONG = torch.arange(2 * 64).reshape(2, 64) * 37 % 4096

AUSTEN = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want
of a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this
truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some
one or other of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield
Park is let at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here,
and she told me all about it." Mr. Bennet made no answer. "Do not you want to know who has taken it?" cried his wife,
impatiently. "You want to tell me, and I have no objection to hearing it." This was invitation enough."""


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary(tiny_llama):
    tiny_llama.model.get_submodule("lm_head").weight.data.zero_()
    assert perplexity(tiny_llama.model, WINDOWS).value == pytest.approx(4096, rel=1e-5)


def test_it_is_the_exponential_of_the_models_own_loss(tiny):
    with torch.no_grad():
        losses = [tiny.model(row[None], labels=row[None]).loss.double() for row in WINDOWS]
    result = perplexity(tiny.model, WINDOWS, batch_size=1)
    assert result.nll == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert result.value == pytest.approx(math.exp(result.nll), rel=1e-12)


@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_the_batch_size_does_not_change_it(tiny_opt, batch_size):
    one = perplexity(tiny_opt.model, WINDOWS, batch_size=1)
    assert perplexity(tiny_opt.model, WINDOWS, batch_size).nll == pytest.approx(one.nll, rel=1e-6)


def test_the_order_of_the_windows_does_not_change_it(tiny_opt):
    one = perplexity(tiny_opt.model, WINDOWS)
    assert perplexity(tiny_opt.model, WINDOWS.flip(0)).nll == pytest.approx(one.nll, rel=1e-12)


def test_it_says_what_was_counted(tiny_opt):
    result = perplexity(tiny_opt.model, WINDOWS, batch_size=2)
    assert (result.tokens, result.windows, result.window, result.stride) == (5 * 31, 5, 32, 32)


def test_each_window_is_predicted_from_itself_alone(tiny_opt):
    alone = [perplexity(tiny_opt.model, row[None]).nll for row in WINDOWS]
    assert perplexity(tiny_opt.model, WINDOWS).nll == pytest.approx(sum(alone) / 5, rel=1e-6)


def test_a_broken_model_is_shown_and_not_hidden(tiny_llama):
    head = tiny_llama.model.get_submodule("lm_head")
    head.weight.data.mul_(1e6)
    assert perplexity(tiny_llama.model, WINDOWS).value == math.inf
    head.weight.data[0, 0] = math.nan
    assert math.isnan(perplexity(tiny_llama.model, WINDOWS).value)


def test_logits_in_half_precision_are_widened_before_anything_is_summed(build):
    model = build("llama-bf16")
    with torch.no_grad():
        logits = torch.stack([model(row[None]).logits[0, :-1] for row in WINDOWS]).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten())
    assert perplexity(model, WINDOWS).nll == pytest.approx(expected.item(), rel=1e-6)


def test_dropout_is_off_and_the_mode_is_given_back(build):
    model = build("opt").train()
    model.config.dropout = 0.5
    first, second = perplexity(model, WINDOWS), perplexity(model, WINDOWS)
    assert first == second
    assert model.training


def test_each_module_is_left_in_its_mode(build):
    model = build("opt").train()
    model.model.decoder.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, WINDOWS)
    assert [module.training for module in model.modules()] == before and set(before) == {True, False}


def test_token_ids_may_be_integers_of_any_size(tiny_opt):
    assert perplexity(tiny_opt.model, WINDOWS.int()) == perplexity(tiny_opt.model, WINDOWS)


@pytest.mark.parametrize(
    ("tokens", "batch_size", "message"),
    [
        (WINDOWS[:0], 1, r"2 or more tokens .*got \[0, 32\]"),
        (WINDOWS[:, :1], 1, r"got \[5, 1\]"),
        (WINDOWS[0], 1, r"got \[32\]"),
        (WINDOWS, 0, "batch_size=0"),
        (WINDOWS, 1.5, r"batch_size=1\.5: a whole number"),
        (WINDOWS.tolist(), 1, "a tensor of ids .*got a value of type list"),
        (WINDOWS.double(), 1, "Token ids are integers"),
        (WINDOWS + 4096, 1, "OPTForCausalLM knows 0 to 4095"),
        (WINDOWS.repeat(1, 3), 1, "Windows of 96 tokens; OPTForCausalLM sees 64 at most"),
    ],
)
def test_what_cannot_be_predicted_is_refused(tiny_opt, tokens, batch_size, message):
    with pytest.raises(CalibrationError, match=message):
        perplexity(tiny_opt.model, tokens, batch_size)


def test_the_embedded_model_reads_english():
    model = load(EMBEDDED, device="cpu", dtype=torch.float32)
    prose = text_windows(AUSTEN.replace("\n", " "), model, 128)
    words = AUSTEN.split()
    shuffled = text_windows(" ".join(sorted(words)), model, 128)
    assert perplexity(model.model, prose).value < 100 < perplexity(model.model, shuffled).value


# ---- a large vocabulary


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(output) if isinstance(x, Tensor))])
        return output


def in_memory(model: HuggingFaceModel, _: Path) -> Perplexity:
    return perplexity(model.model, LONG)


def streamed(model: HuggingFaceModel, folder: Path) -> Perplexity:
    save(model, folder / "model")
    opened = load(folder / "model", device="cpu", stream=True)
    store = FolderStore(folder, len(opened.layers), "cpu")
    with store.scratch(store.count) as record:
        return fit(LONG, of_states(opened, last_states(opened, LONG, record)))[0][0]


def compared(model: HuggingFaceModel, _: Path) -> Any:
    first, second = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    return likelihoods(model, [LONG], [first], {"other": [second]})


def measured(found: Any) -> list[Any]:
    """The numbers of a `Perplexity`, or of a likelihood of each network."""
    if isinstance(found, dict):
        return [numbers for each in found.values() for numbers in (each.nll, each.kl)]
    return [found.nll, found.value]


@pytest.mark.parametrize("measure", [in_memory, streamed, compared])
def test_the_logits_of_a_whole_window_are_never_in_memory(
    measure: Callable[[HuggingFaceModel, Path], Any],
    tiny_llama: HuggingFaceModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """And what is measured is the same, but for how a product of fewer rows rounds: some CPUs have a kernel for it."""
    with Largest() as whole:
        expected = measure(tiny_llama, tmp_path)
    monkeypatch.setattr("convexprune.adapters._discovery.passes.NUMBERS", 20 * 4096)
    with Largest() as pieces:
        found = measure(tiny_llama, tmp_path)
    for one, other in zip(measured(found), measured(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-7)
    assert pieces.numbers < 63 * 4096 <= whole.numbers


def test_the_decoder_runs_once_a_window(tiny_llama: HuggingFaceModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("convexprune.adapters._discovery.passes.POSITIONS", 5)
    runs = list[int]()
    with tiny_llama.layers[0].module.register_forward_hook(lambda *_: runs.append(1)):
        perplexity(tiny_llama.model, LONG)
    assert len(runs) == len(LONG)


def test_a_decoder_whose_output_cannot_be_replayed_runs_again(tiny_llama: HuggingFaceModel, monkeypatch):
    """It is not where transformers says, or what it gives is not of all positions."""
    expected = perplexity(tiny_llama.model, LONG)
    monkeypatch.setattr("convexprune.adapters._discovery.passes.POSITIONS", 5)
    for other in (None, tiny_llama.model, tiny_llama.model.get_input_embeddings()):
        monkeypatch.setattr(tiny_llama.model, "get_decoder", lambda other=other: other)
        assert perplexity(tiny_llama.model, LONG).nll == pytest.approx(expected.nll, rel=1e-6)
