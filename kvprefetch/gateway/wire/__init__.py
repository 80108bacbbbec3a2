"""The dialects: requests and answers read, drafts made of them, answers of our own written.

Pure functions: no I/O, no clock, no state. They never change what they are given. Only `read_request` and
`read_loosely` raise, and only InvalidRequest.
"""

from kvprefetch.gateway.wire.drafts import next_draft, opening_draft, request_draft
from kvprefetch.gateway.wire.pieces import Cuts, one_token, text_length, truncated
from kvprefetch.gateway.wire.prewarm import error_answer, prewarm_answer
from kvprefetch.gateway.wire.read import dialect_of, read_answer, read_loosely, read_request

__all__ = [
    "Cuts",
    "dialect_of",
    "error_answer",
    "next_draft",
    "one_token",
    "opening_draft",
    "prewarm_answer",
    "read_answer",
    "read_loosely",
    "read_request",
    "request_draft",
    "text_length",
    "truncated",
]
