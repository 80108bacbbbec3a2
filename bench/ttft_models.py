"""The models and texts of the TTFT bench: SmolLM2 and real text on a CPU, a Llama-3.1-8B shape on a GPU."""

import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvprefetch.demo.model import find_model
from kvprefetch.engines.attention import IMPLEMENTATION
from kvprefetch.engines.load import LoadedModel, load_model, prepare
from kvprefetch.settings import EngineSettings


class Texts:
    """Draws contexts and suffixes: stretches of the standard library's source, or random ids without tokenizer."""

    def __init__(self, loaded: LoadedModel, seed: int) -> None:
        self.random = random.Random(seed)
        self.vocab = int(loaded.model.config.vocab_size)
        self.corpus: list[int] = []
        self.ending: list[int] = []
        tokenizer = loaded.tokenizer
        if tokenizer is not None:
            files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
            text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
            self.corpus = tokenizer(text[:1_500_000])["input_ids"]
            self.ending = tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]

    def context(self, tokens: int) -> list[int]:
        """A context of exactly so many tokens, another one at each call."""
        if not self.corpus:
            return [self.random.randrange(self.vocab) for _ in range(tokens)]
        start = self.random.randrange(len(self.corpus) - tokens)
        return self.corpus[start : start + tokens]

    def suffix(self, tokens: int) -> list[int]:
        """New words and the generation prompt, so many tokens together."""
        return self.context(tokens - len(self.ending)) + self.ending


def cpu_model(source: str | None, dtype: str) -> LoadedModel:
    """SmolLM2-135M-Instruct, or what `source` names."""
    return load_model(find_model(source), EngineSettings(device="cpu", dtype=dtype))


def gpu_model() -> LoadedModel:
    """A model of Llama-3.1-8B's shape with random weights in bf16; nothing is downloaded."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=132_096,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=IMPLEMENTATION)
    return prepare(model, None, "Llama-3.1-8B shape, random weights")


def card_floor_s(loaded: LoadedModel, context: int, suffix: int, kv_bytes_per_token: int) -> float:
    """The least time for `suffix` tokens behind a resident context, from this card's own measured rates.

    All weights and all KV are read once; the suffix's products run at the measured rate of a large product.
    """
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    flops = 2 * suffix * sum(p.numel() for p in loaded.model.parameters())
    bandwidth, rate = _copy_bytes_per_s(), _product_flops_per_s()
    return float(max((weights + context * kv_bytes_per_token) / bandwidth, flops / rate))


def _copy_bytes_per_s() -> float:
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = _cuda_seconds(lambda: target.copy_(source))
    return 2 * source.numel() / seconds  # read and written


def _product_flops_per_s() -> float:
    n = 8192
    a = torch.randn((n, n), device="cuda", dtype=torch.bfloat16)
    b = torch.randn((n, n), device="cuda", dtype=torch.bfloat16)
    return 2 * n**3 / _cuda_seconds(lambda: a @ b)


def _cuda_seconds(work: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats
