"""Tiny random models of many families, each as the library builds it from its own config."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

WINDOW = 24  # where a family slides
VOCABULARY = 96

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
PLAIN = {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}

ZOO: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SHAPE, **PLAIN),
    "llama, rope of llama3": lambda: hf.LlamaConfig(**SHAPE, **PLAIN, rope_parameters=LLAMA3),
    "llama, rope yarn": lambda: hf.LlamaConfig(**SHAPE, **PLAIN, rope_parameters=YARN),
    "qwen2": lambda: hf.Qwen2Config(**SHAPE, **PLAIN),
    "qwen2, windows in its upper layer": lambda: hf.Qwen2Config(
        **SHAPE, **PLAIN, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE, **PLAIN, head_dim=16),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        **SHAPE, **PLAIN, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "mistral, windows": lambda: hf.MistralConfig(**SHAPE, **PLAIN, sliding_window=WINDOW),
    "phi3": lambda: hf.Phi3Config(**SHAPE, **PLAIN, sliding_window=None),
    "phi3, windows": lambda: hf.Phi3Config(**SHAPE, **PLAIN, sliding_window=WINDOW),
    "gemma2, soft caps": lambda: hf.Gemma2Config(
        **SHAPE, **PLAIN, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SHAPE,
        **PLAIN,
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZE, **PLAIN, intermediate_size=48, max_position_embeddings=512),
    "gpt-2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2
    ),
    "opt": lambda: hf.OPTConfig(
        **SIZE, ffn_dim=48, max_position_embeddings=512, init_std=0.2, word_embed_proj_dim=32, pad_token_id=1
    ),
    "phi": lambda: hf.PhiConfig(**SIZE, **PLAIN, intermediate_size=48, max_position_embeddings=512),
    "olmo2": lambda: hf.Olmo2Config(**SHAPE, **PLAIN),
    "smollm3": lambda: hf.SmolLM3Config(**SHAPE, **PLAIN, no_rope_layers=[1, 0]),
    "granite": lambda: hf.GraniteConfig(**SHAPE, **PLAIN, attention_multiplier=0.2, residual_multiplier=0.8),
    "cohere": lambda: hf.CohereConfig(**SHAPE, **PLAIN, logit_scale=1.0),
    "starcoder2, windows": lambda: hf.Starcoder2Config(**SHAPE, **PLAIN, sliding_window=WINDOW),
}


def tiny_model(config: Any) -> Any:
    """A model of `config` with random weights, the same each time."""
    torch.manual_seed(3)
    return hf.AutoModelForCausalLM.from_config(config).float().eval()
