"""llama.cpp as a library, for the tests that need it: `pip install llama-cpp-py-sync`, `pytest -m llamacpp`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class LlamaCpp:
    """A GGUF file, loaded by llama.cpp."""

    def __init__(self, path: Path, tokens: int) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # pyright: ignore

        self._ffi: Any = get_ffi()
        self._lib: Any = get_lib()
        self._silent = self._ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
        self._lib.llama_log_set(self._silent, self._ffi.NULL)
        self._lib.llama_backend_init()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        assert self._model != self._ffi.NULL, f"{path}: llama.cpp cannot load it"
        asked: Any = self._lib.llama_context_default_params()
        asked.n_ctx = asked.n_batch = asked.n_ubatch = tokens
        asked.n_threads = asked.n_threads_batch = 1
        asked.flash_attn_type = asked.type_k = asked.type_v = 0  # float32, step by step
        self._context = self._lib.llama_init_from_model(self._model, asked)
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        out = self._ffi.new("llama_token[]", room)
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), out, room, True, True)
        return list(out[0:count])

    def logits(self, window: Tensor) -> Tensor:
        """Those of each position [tokens words] of a window [tokens]."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        batch = self._lib.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert self._lib.llama_decode(self._context, batch) == 0
        self._lib.llama_batch_free(batch)
        words = 4 * self._lib.llama_vocab_n_tokens(self._vocabulary)
        rows = (self._lib.llama_get_logits_ith(self._context, i) for i in range(len(window)))
        return torch.stack(
            [torch.frombuffer(self._ffi.buffer(row, words), dtype=torch.float32).clone() for row in rows]
        )
