"""Small models for all tests. None needs a network; those of `pytest -m gpu` need a GPU, and the others see none."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from runs import LAYERS, SETTINGS, checksums, place_of, stop_after
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import convexprune
from convexprune.adapters import EMBEDDED, HuggingFaceModel
from convexprune.errors import ModelError

torch.set_num_threads(1)


VOCABULARY = 4096  # the bundled tokenizer's, so that the tiny models can read text
POSITIONS = 64
SPREAD = 0.2  # initial weights ten times the usual, so that layers do something


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            init_std=SPREAD,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _llama(tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            initializer_range=SPREAD,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": _opt,
    "llama": lambda: _llama(tied=False),
    "llama-tied": lambda: _llama(tied=True),
    "opt-bf16": lambda: _opt().to(torch.bfloat16),  # pyright: ignore[reportArgumentType]
    "llama-bf16": lambda: _llama(tied=False).to(torch.bfloat16),  # pyright: ignore[reportArgumentType]
}


@pytest.fixture
def build() -> Callable[[str], PreTrainedModel]:
    """Builds a tiny random model by its name in TINY: always the same weights, always a new model."""

    def built(name: str) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TINY[name]().eval()

    return built


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def tiny_opt(build: Callable[[str], PreTrainedModel], tokenizer: Tokenizer) -> HuggingFaceModel:
    return HuggingFaceModel(build("opt"), tokenizer, name="tiny-opt")


@pytest.fixture
def tiny_llama(build: Callable[[str], PreTrainedModel], tokenizer: Tokenizer) -> HuggingFaceModel:
    return HuggingFaceModel(build("llama"), tokenizer, name="tiny-llama")


@pytest.fixture(params=TINY)
def tiny(
    request: pytest.FixtureRequest, build: Callable[[str], PreTrainedModel], tokenizer: Tokenizer
) -> HuggingFaceModel:
    """Each tiny model in turn."""
    return HuggingFaceModel(build(request.param), tokenizer, name=f"tiny-{request.param}")


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


@pytest.fixture(scope="session")
def interrupted(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted in its third layer, to be copied."""
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.raises(KeyboardInterrupt):
        convexprune.prune(dense, output_dir=folder, on_progress=stop_after(2), **SETTINGS)
    return folder


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted in its third layer."""
    shutil.copytree(place_of(interrupted), place_of(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture(autouse=True, scope="session")
def no_flushing() -> Iterator[None]:
    """No test cuts the power: those about what is flushed, and when, look at the calls (`disk.py`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def refused(record_property: Callable[[str, Any], None]) -> Callable[[str, str], AbstractContextManager[None]]:
    """`with refused(what, match)`: a ModelError is raised, and goes with its message into lab/families.md."""

    @contextmanager
    def block(what: str, match: str) -> Iterator[None]:
        with pytest.raises(ModelError, match=match) as caught:
            yield
        record_property("transformers", transformers.__version__)
        record_property("refused", what)
        record_property("message", str(caught.value))

    return block


# Always the same examples, so that a failure in CI is a failure here; no deadline, because machines are shared.
# Others, and many more of them: pytest --hypothesis-profile thorough tests/property
settings.register_profile("convexprune", deadline=None, derandomize=True, max_examples=10)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.load_profile("convexprune")
