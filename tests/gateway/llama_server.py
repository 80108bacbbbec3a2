"""llama.cpp's own HTTP server in a process of its own. The wheel `xllamacpp` holds it."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from gguf import GGUFWriter, TokenType
from processes import PATIENCE_S, until
from real_engines import RealEngine
from tiny_models import tiny_llama, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

_SERVE = """
import signal, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = sys.argv[1], {"llama"}
params.port, params.n_parallel, params.n_ctx, params.cache_ram_mib = 0, *map(int, sys.argv[2:5])
params.endpoint_metrics = sys.argv[5] == "True"
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.endpoint_props, params.warmup, params.n_batch = True, False, 128
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
signal.pause()
"""

_WHOLE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_OF_A_LAYER = {
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
    **{"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}


@contextmanager
def llama_server(
    model: Path, slots: int = 2, tokens: int = 2_048, cache_ram_mib: int = 0, *, metrics: bool = True
) -> Iterator[RealEngine]:
    """A server whose slots have `tokens` together. Ends when left."""
    arguments = [str(model), *map(str, (slots, tokens, cache_ram_mib, metrics))]
    with tempfile.TemporaryDirectory() as work:
        log = Path(work) / "llama.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://"), "llama.cpp does not start:\n" + log.read_text(errors="replace")[-4_000:]
            until(lambda: httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200, "llama.cpp is not ready")
            yield RealEngine(url, "llama", process.pid, log)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def tiny_gguf(target: Path) -> Path:
    """The tiny Llama with its tokenizer, in float32, as llama.cpp reads it."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    config = model.config
    writer = GGUFWriter(target, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    for name, weights in model.state_dict().items():
        *before, part, _ = name.split(".")
        if part in ("q_proj", "k_proj"):  # its rotary pairs lie beside each other
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            weights = weights.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weights.shape)
        here = _WHOLE.get(part) or f"blk.{before[2]}.{_OF_A_LAYER[part]}"
        writer.add_tensor(f"{here}.weight", weights.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    tokens, special = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), set(tokenizer.all_special_ids)
    kinds = [TokenType.CONTROL if at in special else TokenType.NORMAL for at in range(len(tokens))]
    unused = size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"<unused {at}>" for at in range(unused))])
    writer.add_token_types([*kinds, *[TokenType.UNUSED] * unused])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
