"""A tiny random Llama with a tiny tokenizer, and settings for engines over it."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvprefetch.engines.load import LoadedModel
from kvprefetch.engines.selftest import page_shape
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

VOCABULARY = 512
CORPUS = (
    "The warehouse opens at seven and the night shift hands over its list of parcels.",
    "A short answer is enough: yes, the second shelf holds the spare parts for the pump.",
    "def total(prices):\n    return sum(price for price in prices if price is not None)\n",
    "Please read the handbook first, then tell me what the return policy says about shoes.",
    "In 2024 there were 365 requests a day, 17 of them late; in 2025 there were 410.",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that speaks ChatML; any text goes through it and back."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Random weights, the same each time, wide enough that greedy answers wander; `changes` to its config."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).float().eval()


def tiny_settings(
    model: LoadedModel, pages: int = 64, block_tokens: int = 16, chunk_tokens: int = 64, **engine: object
) -> Settings:
    """Settings whose pool holds `pages` pages of `model`, on a CPU."""
    size = str(pages * page_shape(model, block_tokens).bytes)
    return Settings(
        pool=PoolSettings(size=size, block_tokens=block_tokens),
        engine=EngineSettings(device="cpu", chunk_tokens=chunk_tokens, **engine),
    )
