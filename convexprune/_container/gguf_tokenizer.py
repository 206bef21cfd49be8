"""The tokenizer of a folder, in the words of llama.cpp."""

import json
import logging
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from convexprune.errors import ModelError

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
    said = json.loads(path.read_text(encoding="utf-8"))
    merges_bytes = not said["model"].get("byte_fallback", False)
    tokens, kinds = _tokens(Tokenizer.from_file(str(path)), said, words, merges_bytes)
    writer.add_tokenizer_model("gpt2" if merges_bytes else "llama")
    writer.add_tokenizer_pre(_split(said, path) if merges_bytes else "default")
    writer.add_token_list(tokens)
    if not merges_bytes:
        writer.add_token_scores(_scores(said, tokens))
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=merges_bytes, n_vocab=len(tokens))
    special.add_special_token |= _added(Tokenizer.from_file(str(path)), special.special_token_ids)
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
        raise ModelError(f"{path}: llama.cpp's name for its way to split text is not known here ({shown(parts)}).")
    return SPLITS[expression]


def shown(parts: list[Any]) -> str:
    """Return a short text for parts of a tokenizer."""
    text = json.dumps(parts)
    return text if len(text) < 200 else f"{text[:200]}..."


def _added(tokenizer: Tokenizer, special: dict[str, int]) -> dict[str, bool]:
    """Return whether the tokenizer begins a text with its first token, and ends it with its last."""
    ids = tokenizer.encode("a").ids
    return {"bos": ids[0] == special.get("bos"), "eos": ids[-1] == special.get("eos")}
