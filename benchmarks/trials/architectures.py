"""Tiny random models, in memory: one decoder, and what is none or another kind."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 4096  # the bundled tokenizer's
POSITIONS = 128


def llama(layers: int = 2, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random decoder of 64 channels with weights ten times the usual, so that its layers do something."""
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 0,
    } | settings  # fmt: skip
    return made(LlamaForCausalLM, LlamaConfig(num_hidden_layers=layers, **settings), seed)


def made(model: Callable[[Any], PreTrainedModel], config: Any, seed: int = 0) -> PreTrainedModel:
    """A model with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config).eval()


def small_bert(decoder: bool = False) -> PreTrainedModel:
    """An encoder, or the decoder that the same code makes."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=POSITIONS, is_decoder=decoder, initializer_range=0.2,
    )  # fmt: skip
    return made(BertLMHeadModel if decoder else BertForMaskedLM, config)


def small_t5() -> PreTrainedModel:
    """An encoder with a decoder."""
    return made(T5ForConditionalGeneration, T5Config(vocab_size=VOCABULARY, d_model=64, d_ff=128, num_layers=2))


def small_mamba() -> PreTrainedModel:
    """A decoder without attention."""
    return made(MambaForCausalLM, MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2))


def classifier() -> PreTrainedModel:
    """A decoder with a head for classes."""
    config = llama().config
    config.pad_token_id = 0
    return made(LlamaForSequenceClassification, config)
