"""What transformers reads, with its many kinds of failure made one; and tokenizers, of which it invents some."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from convexprune.errors import DependencyError, ModelError, install_hint

# transformers invents an empty tokenizer for a folder that has none; so look before asking it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def given_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a caller gave: as an object of transformers, or as a folder or a name on the hub.

    Raises:
        ModelError: it is neither, or cannot be read.
    """
    if isinstance(tokenizer, str | Path):
        name = str(Path(tokenizer).expanduser())
        read = read_tokenizer(name, {"pretrained_model_name_or_path": name})
        if read is None:
            raise ModelError(f"{tokenizer}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}).")
        return read
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    raise ModelError(
        f"A {type(tokenizer).__name__} is no tokenizer. Accepted: a tokenizer of transformers, its folder, or its name "
        "on the hub."
    )


def read_tokenizer(source: str, place: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """That of a model's folder, .gguf file or name on the hub; None of a folder that has none."""
    folder = Path(place["pretrained_model_name_or_path"])
    if "gguf_file" not in place and folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return ask(f"{source} (tokenizer)", lambda: AutoTokenizer.from_pretrained(**place))


def ask(source: str, read: Callable[[], Any]) -> Any:
    """What transformers reads, with its many kinds of failure made one."""
    try:
        return read()
    except ImportError as cause:
        raise DependencyError(f"{source}: {cause} For GGUF files: {install_hint('gguf')}") from cause
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as cause:
        raise ModelError(
            f"{source}: cannot be read ({type(cause).__name__}: {cause}). Is the name right, is everything "
            "downloaded, and are the weights safetensors? Pickles need allow_pickle=True."
        ) from cause
