"""Architectures and tokenizers as llama.cpp knows them: the keys of a GGUF file, the names and the rows of tensors."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer
from torch import Tensor

from convexprune._container.layouts import stored_names
from convexprune._storage.files import read_text
from convexprune.errors import ModelError, shown

SIZES = {
    "add_context_length": "max_position_embeddings",
    "add_embedding_length": "hidden_size",
    "add_feed_forward_length": "intermediate_size",
    "add_head_count": "num_attention_heads",
    "add_head_count_kv": "num_key_value_heads",
    "add_layer_norm_rms_eps": "rms_norm_eps",
    "add_expert_count": "num_local_experts",
    "add_expert_used_count": "num_experts_per_tok",
    "add_expert_feed_forward_length": "moe_intermediate_size",
    "add_expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "add_key_length": "head_dim",
    "add_value_length": "head_dim",
    "add_vocab_size": "vocab_size",
}
"""Methods of the writer, and the settings of `config.json` that they take."""
LONGEST = 1 << 28  # bytes of config.json
NEEDED = (
    "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps", "vocab_size",
)  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
SCALING = {
    "default": (), "linear": ("factor",), "yarn": ("factor", ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
}  # fmt: skip
"""Types of rotary embeddings that a file can say, and the numbers that they have."""
YARN = (
    ("attention_factor", None), ("mscale", None), ("mscale_all_dim", None),
    ("beta_fast", 32), ("beta_slow", 1), ("truncate", True),
)  # fmt: skip
"""Further settings of YaRN, none of which a file says here, and what llama.cpp computes with."""
FRACTIONS = ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor")
"""Settings that need not be whole numbers."""
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
ROTATED = re.compile(r".*\.(q|k)_proj\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """The name that llama.cpp has for an architecture, and what it takes for granted of its configuration.

    With `neighbours` it rotates pairs of neighbouring channels, where transformers rotates the halves of a head.
    """

    name: str
    neighbours: bool = False
    granted: tuple[tuple[str, Any], ...] = ()


ALL_MIXED = (("mlp_only_layers", []), ("decoder_sparse_step", 1))  # every layer has experts
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", neighbours=True),
    "MistralForCausalLM": Architecture("llama", neighbours=True),
    "MixtralForCausalLM": Architecture("llama", neighbours=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe", granted=(("norm_topk_prob", False), *ALL_MIXED)),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", granted=(("norm_topk_prob", True), *ALL_MIXED)),
}


class GGUFModel:
    """The settings of `config.json` in the words of llama.cpp."""

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        (name, *_) = map(str, config.get("architectures") or [None])
        if name not in ARCHITECTURES:
            raise ModelError(f"{folder}: {name} cannot be written as GGUF. Known: {', '.join(ARCHITECTURES)}.")
        self.config, self.architecture = dict(config), ARCHITECTURES[name]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self.kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if str(self.kind) not in SCALING:
            raise ModelError(f"{folder}: rotary embeddings of type {self.kind!r} cannot be written as GGUF.")
        default = 1e6 if name == "MixtralForCausalLM" else 1e4  # by which transformers rotates, too
        self.rope = {"rope_theta": config.get("rope_theta", default)} | rope
        self._require_computed(folder)
        self._require_numbers(folder)
        keys = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        self.layers = int(config["num_hidden_layers"])
        self._names = gguf.get_tensor_name_map(keys[self.architecture.name], self.layers)

    def _require_computed(self, folder: Path) -> None:
        """Refuse settings with which llama.cpp does not compute."""
        said = self.config | self.rope
        further = YARN if self.kind == "yarn" else ()
        for key, value in (("hidden_act", "silu"), ("use_sliding_window", False), *self.architecture.granted, *further):
            if (found := said.get(key)) is not None and found != value:
                raise ModelError(
                    f"{folder}: {key} is {found!r}; llama.cpp computes {self.architecture.name} with {value!r}."
                )

    def _require_numbers(self, folder: Path) -> None:
        """Refuse settings of which no key of a file can be made."""
        config = self.config
        given = [key for key in ("num_experts", *SIZES.values()) if config.get(key) is not None]
        numbers: dict[str, Any] = {key: config.get(key) for key in (*NEEDED, *given)}
        numbers |= {key: self.rope.get(key) for key in ("rope_theta", *SCALING[self.kind])}
        for key, value in numbers.items():
            kinds, largest = ((int, float), 1e38) if key in FRACTIONS else ((int,), 1 << 32)
            if type(value) not in kinds or not 0 < value < largest:
                raise ModelError(f"{folder}: {key} is {shown(value)} in config.json, no positive number. Correct it.")

    @classmethod
    def of(cls, folder: Path) -> "GGUFModel":
        """Return the model of a folder."""
        try:
            config = json.loads(read_text(folder / "config.json", LONGEST))
        except (ValueError, RecursionError) as cause:
            raise ModelError(f"{folder}: config.json cannot be read ({cause}). Copy or download it again.") from cause
        if not isinstance(config, dict):
            raise ModelError(f"{folder}: config.json holds no settings. Copy or download it again.")
        return cls(config, folder)

    def require(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse tensors of other shapes than the configuration says, or of fewer layers: no file of them opens."""
        hidden, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        queries, keys = heads * self._head, (self.config.get("num_key_value_heads") or heads) * self._head
        of_layer: dict[str, Any] = dict.fromkeys(name.split(".", 2)[2] for name in shapes if name.startswith("blk."))
        of_layer |= {"attn_q.weight": [queries, hidden], "attn_output.weight": [hidden, queries]}
        of_layer |= {f"attn_{name}.weight": [keys, hidden] for name in "kv"}
        if "ffn_gate_inp.weight" not in of_layer:
            of_layer["ffn_down.weight"] = [hidden, self.config["intermediate_size"]]
        expected = {f"blk.{n}.{name}": shape for n in range(self.layers) for name, shape in of_layer.items()}
        expected |= {"token_embd.weight": [self.config["vocab_size"], hidden], "output_norm.weight": [hidden]}
        for name, shape in expected.items():
            if name not in shapes or (shape and list(shapes[name]) != shape):
                found = f"is {list(shapes[name])}, not {shape}" if name in shapes else "is not there"
                raise ModelError(
                    f"{name} {found}, as it would be by config.json. Copy or download the checkpoint again, or correct "
                    "its config.json."
                )

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the sizes of the model."""
        sizes = {"num_local_experts": self.config.get("num_experts")} | self.config
        writer.add_block_count(self.layers)
        for method, key in SIZES.items():
            if sizes.get(key) is not None:
                getattr(writer, method)(sizes[key])
        if self.architecture.name == "llama":
            writer.add_rope_dimension_count(self._head)
        writer.add_rope_freq_base(float(self.rope["rope_theta"]))
        if self.kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.kind))
            writer.add_rope_scaling_factor(float(self.rope["factor"]))
        if self.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(self.rope[ORIGINAL])

    @property
    def _head(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]

    def extra(self) -> dict[str, Tensor]:
        """Return tensors that a file has and a checkpoint does not: what LLaMA 3 divides its frequencies by."""
        if self.kind != "llama3":
            return {}
        theta, factor = self.rope["rope_theta"], self.rope["factor"]
        low, high = self.rope["low_freq_factor"], self.rope["high_freq_factor"]
        exponents = torch.arange(0, self._head, 2, dtype=torch.float32) / self._head
        turns = self.rope[ORIGINAL] / (2 * pi * theta**exponents)
        smooth = (turns - low) / (high - low)
        factors = torch.where(turns < low, factor, 1 / ((1 - smooth) / factor + smooth))
        return {"rope_freqs.weight": torch.where(turns > high, 1.0, factors)}

    def place(self, name: str) -> tuple[str, int | None]:
        """Return the name in the file of a stored tensor, and its number if it is one expert of several."""
        found = EXPERT.fullmatch(name)
        stored = name if found is None else f"{found[1]}.{found[3]}.weight"
        new = self._names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ModelError(f"{name} has no name in GGUF files of {self.architecture.name} with {self.layers} layers.")
        return new, None if found is None else int(found[2])

    def operator(self, name: str) -> list[tuple[str, int | None]]:
        """Return the places of an operator, by its name in a report: the halves of its rows may have two."""
        return [self.place(f"{each}.weight") for each in stored_names(name)]

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor [m ...] with its rows in the order of the file."""
        match = ROTATED.fullmatch(name) if self.architecture.neighbours else None
        if match is None:
            return tensor
        heads = self.config["num_attention_heads"]
        heads = heads if match[1] == "q" else self.config.get("num_key_value_heads") or heads
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


logger = logging.getLogger(__name__)
FILE, PIECES = "tokenizer.json", "tokenizer.model"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {CONTRACTIONS + r"\p{N}{1,3}" + REST: "llama-bpe", CONTRACTIONS + r"\p{N}" + REST: "qwen2"}
"""The names that llama.cpp has for the expressions which text is split by before bytes are merged."""
SPACE = "▁"


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, words: int) -> None:
    """Write the tokenizer of a folder, which may have fewer `words` than the embedding, or say that there is none."""
    path = folder / FILE
    if not path.is_file():
        logger.warning("%s has no %s: the file is written without a tokenizer", folder, FILE)
        writer.add_tokenizer_model("no_vocab")
        return
    try:
        said, tokenizer = json.loads(read_text(path, LONGEST)), Tokenizer.from_file(str(path))
        merges_bytes = not said["model"].get("byte_fallback", False)
        special = gguf.SpecialVocab(folder, load_merges=merges_bytes, n_vocab=words)
    except Exception as cause:  # tokenizers raises nothing more special
        raise ModelError(f"{folder}: its tokenizer cannot be read ({cause}). Copy or download it again.") from cause
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= words:
        raise ModelError(f"{path} has a token {last:,}, the embedding ends at {words - 1:,}. Is it another model's?")
    tokens, kinds = _tokens(tokenizer, said, words, merges_bytes)
    writer.add_tokenizer_model("gpt2" if merges_bytes else "llama")
    writer.add_tokenizer_pre(_split(said, path) if merges_bytes else "default")
    writer.add_token_list(tokens)
    if not merges_bytes:
        writer.add_token_scores(_scores(said, tokens))
    writer.add_token_types(kinds)
    ids, known = tokenizer.encode("a").ids, special.special_token_ids  # whether a text begins and ends with a token
    special.add_special_token |= {"bos": ids[0] == known.get("bos"), "eos": ids[-1] == known.get("eos")}
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Tokenizer, said: dict[str, Any], words: int, bpe: bool) -> tuple[list[str], list[int]]:
    """Return the text and the kind of each token."""
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {each["id"]: each for each in said.get("added_tokens", [])}
    tokens, kinds = list[str](), list[int]()
    for number in range(words):
        token, kind = known.get(number, f"[PAD{number}]"), gguf.TokenType.NORMAL
        if number not in known:
            kind = gguf.TokenType.UNUSED
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
            token = token if added[number]["special"] else token.replace(SPACE, " ")
        elif not bpe and token == "<unk>":
            kind = gguf.TokenType.UNKNOWN
        elif not bpe and len(token) == 6 and token.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _scores(said: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return scores by which llama.cpp merges pieces in the order of the merges."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in said["model"]["merges"])
    ranks = dict[str, int]()
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks[token]) if token in ranks else -1e6 for token in tokens]


def _split(said: dict[str, Any], path: Path) -> str:
    """Return the name that llama.cpp has for the way in which text is split."""
    parts = said.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    expression = parts[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if expression not in SPLITS:
        raise ModelError(f"{path}: llama.cpp's name for its way to split text is not known here ({_cut(parts)}).")
    return SPLITS[expression]


def _cut(parts: list[Any]) -> str:
    """Return a short text for parts of a tokenizer."""
    text = json.dumps(parts)
    return text if len(text) < 200 else f"{text[:200]}..."
