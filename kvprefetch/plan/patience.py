"""Which request is to wait for others of its own tenant, instead of taking memory of those who have less."""

PATIENCE_S = 5.0
"""For so long a request without room waits before everybody else waits for it, longer if it is larger than its part."""
_SMALL = 128
"""What takes less than this part of the pool is not worth waiting for."""


def is_patient(running: int, asked: int, pages: int) -> bool:
    """Whether a request for so many of the pool's pages can wait: `running` others of its tenant's are in."""
    return running > 0 and asked * _SMALL > pages
