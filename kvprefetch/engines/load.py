"""Load a model for the paged engine: a folder, a GGUF file or a hub id."""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import transformers
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError

from kvprefetch.engines.attention import IMPLEMENTATION
from kvprefetch.engines.support import why_refused
from kvprefetch.errors import SettingsError, UnknownModel, UnsupportedModel
from kvprefetch.settings import EngineSettings

_HUB_PATIENCE_S = 3


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for paged attention, its tokenizer (None: token ids only) and where it came from."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype


def load_model(source: str | Path, settings: EngineSettings) -> LoadedModel:
    """Load `source`. Raises UnknownModel if there is nothing to load, UnsupportedModel if it is refused."""
    device, dtype = pick_device(settings.device), pick_dtype(settings.dtype)
    where = _locate(str(source))
    try:
        if "gguf_file" not in where:  # reading a GGUF's header takes seconds; `prepare` looks at it anyway
            _refuse(transformers.AutoConfig.from_pretrained(**where), str(source))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, attn_implementation=IMPLEMENTATION, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UnknownModel(f"{source}: no model could be loaded: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # the library would go on with random weights in their place
        raise UnknownModel(f"{source}: its files lack {len(missing)} of the model's weights, {missing[0]} among them")
    return prepare(model.to(device), tokenizer, str(source))


def _locate(source: str) -> dict[str, Any]:
    """Arguments for `from_pretrained`. A path that is not there is not asked of the hub."""
    path = Path(os.path.expanduser(source))  # Path's own raises for an unknown user
    is_gguf = path.suffix == ".gguf"
    if is_gguf and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if is_gguf or source.startswith((".", "~", "/", "\\")) or not 0 < len(path.parts) <= 2:
        raise UnknownModel(f"{source}: there is no such {'file' if is_gguf else 'folder'}")
    # asked first, because the library would try for half a minute before it gives up
    return {"pretrained_model_name_or_path": source, "local_files_only": ask_hub() is None}


def ask_hub(path: str = "") -> int | None:
    """The hub's HTTP status for `path`; None if it is out of reach, 0 if only its certificate is unknown here."""
    try:
        with urlopen(Request(f"{ENDPOINT}/{path}", method="HEAD"), timeout=_HUB_PATIENCE_S) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code
    except OSError as error:  # the library's client brings certificates of its own
        return 0 if isinstance(getattr(error, "reason", None), ssl.SSLError) else None


def prepare(model: Any, tokenizer: Any, name: str) -> LoadedModel:
    """Take a transformers model that is already in memory (it is switched to paged attention)."""
    _refuse(model.config, name)
    if not model.is_backend_compatible():
        raise UnsupportedModel(f"{name}: its attention does not go through transformers' AttentionInterface")
    model.set_attn_implementation(IMPLEMENTATION)
    model.eval().requires_grad_(False)
    if tokenizer is not None and not tokenizer.is_fast:
        raise UnsupportedModel(f"{name}: its tokenizer has no fast version, which streaming needs")
    return LoadedModel(model, tokenizer, name)


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is any, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"engine.device {name!r}: {_first_line(error)}") from error


def pick_dtype(name: str) -> torch.dtype | str:
    """ "auto" leaves the choice to the model's files."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return "auto"
    if name not in known:
        raise SettingsError(f"engine.dtype {name!r}: choose auto or one of {', '.join(known)}")
    return known[name]


def _refuse(config: Any, name: str) -> None:
    reason = why_refused(config)
    if reason:
        raise UnsupportedModel(f"{name}: {reason}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
