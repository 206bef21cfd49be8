"""Read and build models by transformers, and turn its many kinds of failure into a ModelError."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from convexprune.errors import ConvexpruneError, DependencyError, ModelError, install_hint

from .model_folder import NotStreamable, place_of

# transformers invents an empty tokenizer for a folder that has none; so look before asking it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")

TOKENIZER = " (tokenizer)"  # behind the name of a model, in errors
LONGEST_CAUSE = 300  # characters of what transformers says


def given_tokenizer(tokenizer: Any) -> transformers.PreTrainedTokenizerBase | None:
    """Return a caller's tokenizer: an object of transformers, a folder, a name on the hub, or None."""
    if isinstance(tokenizer, str | Path):
        name = str(Path(tokenizer).expanduser())
        read = read_tokenizer(name, place_of(name))
        if read is None:
            raise ModelError(f"{tokenizer}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}).")
        return read
    if tokenizer is None or isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return tokenizer
    raise ModelError(
        f"A value of type {type(tokenizer).__name__} is no tokenizer. Accepted: a tokenizer of transformers, its "
        "folder, or its name on the hub."
    )


def read_tokenizer(source: str, place: dict[str, Any]) -> transformers.PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model's folder, .gguf file or name on the hub; None of a folder that has none."""
    folder = Path(place["pretrained_model_name_or_path"])
    if "gguf_file" not in place and folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return ask(source + TOKENIZER, lambda: transformers.AutoTokenizer.from_pretrained(**place))


def ask(source: str, read: Callable[[], Any]) -> Any:
    """Call a function of transformers, and turn its failures into a ModelError."""
    try:
        return read()
    except (ConvexpruneError, NotStreamable, MemoryError):
        raise
    except ImportError as cause:
        hint = f" For GGUF files: {install_hint('gguf')}" if source.endswith(".gguf") else ""
        raise DependencyError(f"{source}: {cause}{hint}") from cause
    except UnpicklingError as cause:  # its text tells how to run the code
        raise ModelError(
            f"{source}: cannot be read: its pickles hold more than tensors, and that is not run. Convert them to "
            "safetensors."
        ) from cause
    except Exception as cause:  # tokenizers raises nothing more special
        said = f"{type(cause).__name__}: {shorten(str(cause), LONGEST_CAUSE, placeholder=' ...')}"
        if Path(source.removesuffix(TOKENIZER)).expanduser().exists():
            text = f"cannot be read ({said}). Is the folder complete and undamaged?"
        else:
            text = f"there is no such folder here, and the hub does not give it ({said}). Is the name right?"
        raise ModelError(f"{source}: {text}") from cause


def model_class(source: str, config: transformers.PretrainedConfig) -> Any:
    """Return the class of transformers that reads a language model with this configuration, wrapped or not."""
    if not config.is_encoder_decoder:  # BART's type is among decoders, too: for its decoder alone
        if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or "auto_map" in vars(config):
            return transformers.AutoModelForCausalLM
        if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return transformers.AutoModelForImageTextToText
    raise ModelError(
        f"{source}: transformers {transformers.__version__} has no model of type {config.model_type!r} that only "
        "decodes text, alone or with images before it. Encoders, and encoders with a decoder, are not pruned."
    )


LARGE = 2**30  # numbers in a tensor: more than any buffer has, fewer than the experts of the largest models
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
DRAWS = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"}  # by name: transformers has its own of each


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give modules built in the context parameters without memory; buffers, as of rotary embeddings, are computed."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register


class _LargeOnMeta(TorchFunctionMode):
    """Large tensors on the meta device: they would not fit into memory until registered.

    Nothing is drawn for tensors without memory: torch traces drawing in Python, which took three quarters of the
    time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            made = func(*args, **kwargs | {"device": "meta"})
            if made.numel() > LARGE:
                return made
        if getattr(func, "__name__", None) in DRAWS and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        return func(*args, **kwargs)
