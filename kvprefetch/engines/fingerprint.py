"""The exact fingerprint of a loaded model (law 4): equal fingerprints produce equal pages."""

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import torch

from kvprefetch.cache.keys import Fingerprint
from kvprefetch.engines.support import rope_parameters
from kvprefetch.tiers.device import LAYOUT, PageShape

# Where a model lies and how it is run say nothing about its bytes.
_IRRELEVANT = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "attn_implementation"}


def fingerprint(model: Any, shape: PageShape, adapter: str = "", numerics: str = "") -> Fingerprint:
    """Hash all weights and name everything else that changes a page. Reads every weight once."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _IRRELEVANT}
    return Fingerprint(
        weights=_weights_hash(model),
        config=sha256(_canonical(config)).hexdigest(),
        dtype=str(shape.dtype),
        rope=_canonical(rope_parameters(model.config)).decode(),
        quantisation=_canonical(config.get("quantization_config")).decode(),
        adapter=adapter,
        block_tokens=shape.block_tokens,
        layout=LAYOUT,
        numerics=numerics,
    )


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _weights_hash(model: Any) -> str:
    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock
        digests = threads.map(lambda item: _tensor_hash(*item), tensors)
        return sha256(b"".join(digests)).hexdigest()


def _tensor_hash(name: str, tensor: torch.Tensor) -> bytes:
    head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return sha256(head + sha256(data.numpy().data).digest()).digest()
