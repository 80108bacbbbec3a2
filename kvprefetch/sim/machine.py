"""What the replayed machine is, and how long it takes for what."""

from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class Machine:
    """One worker's GPU, host memory and link; the defaults are an 8B GQA model in bf16 on one H200.

    Prefill of positions a…b takes (2·P·(b−a) + 2·L·d·(b²−a²)) ÷ rate seconds: weights once per token, and attention
    over what comes before it.
    """

    gpu_tokens: int = 880_000
    host_tokens: int = 7_040_000
    block_tokens: int = 64
    kv_bytes_per_token: float = 131_072.0
    reload_gbps: float = 55.0  # host → GPU, 10⁹ bytes/s
    prefill_tflops: float = 0.6 * 790  # achieved
    params: float = 8.03e9
    layers: int = 32
    width: int = 4096
    slice_s: float | None = 0.25  # of prefill, in turns; None: first come, first served
    decode_s: float = 0.02  # per output token, where the trace does not know how long a request took
    chunk_s: float = 0.02  # one speculative transfer, which a demand load waits for at most

    @property
    def linear(self) -> float:
        """Seconds of prefill per token, without attention."""
        return 2 * self.params / (self.prefill_tflops * 1e12)

    @property
    def quadratic(self) -> float:
        """Seconds of prefill per squared position."""
        return 2 * self.layers * self.width / (self.prefill_tflops * 1e12)

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds to compute the KV of tokens `start`…`end`."""
        return self.linear * (end - start) + self.quadratic * (end * end - start * start)

    def prefill_end(self, start: int, seconds: float) -> int:
        """How far `seconds` of prefill come from `start`; at least one token."""
        a, b = self.quadratic, self.linear
        c = a * start * start + b * start + seconds
        end = (sqrt(b * b + 4 * a * c) - b) / (2 * a) if a else start + seconds / b
        return max(int(end), start + 1)

    def load_s(self, blocks: int) -> float:
        """Seconds to move `blocks` from host to GPU."""
        return blocks * self.block_tokens * self.kv_bytes_per_token / (self.reload_gbps * 1e9)

    @property
    def chunk_blocks(self) -> int:
        """Blocks of one speculative transfer."""
        return max(int(self.chunk_s / self.load_s(1)), 1)
