"""The arena: a file of slots in shared memory, mapped by the service and by all workers of one model's namespace.

Who does what
- The service opens it with `create`, has it to itself (flock), and alone writes headers. Workers `attach`; they write
  the bytes of slots that were reserved for them, and read headers and bytes. None of these calls blocks on others.
- Raises ArenaRefused for a file of another version, namespace or size, a damaged or shortened one, or one that
  another service has; TierUnavailable where there is none, or no room.

How a reader never takes a half-written block for a whole one
- Bytes are written before their header says SEALED, and the state is the last byte of a header that is written. x86
  shows stores to others in the order in which they were made, ARM need not; so a header carries a checksum, and a
  reader that sees half of one takes it for changed.
- Between a block's bytes and its header lies a message from worker to service, and between header and reader one
  from service to reader: system calls order these on every machine.
- `read` compares the whole header before and after copying, sequence included, and verifies the copy, not the slot:
  whatever was read too early or too late has another checksum. Without verification, leases alone protect: a slot
  that anybody holds is not written to.
"""

import ctypes
import logging
import mmap
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvprefetch.errors import ArenaRefused, TierUnavailable
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.files import in_words, open_alone, open_private, unlock
from kvprefetch.tiers.layout import PAGE, Layout, require_same
from kvprefetch.tiers.layout import decode as decode_layout
from kvprefetch.tiers.mapped import address_of, map_file
from kvprefetch.tiers.slots import HEADER_BYTES, IN_TRANSIT, SlotHeader, decode, encode, sealed_checksum

log = logging.getLogger(__name__)


class ArenaFile:
    """See the module's promises. Open with `create` or `attach`.

    `buffer` is all slots' memory, slot i at `i * slot_bytes`. Views of it stay valid after `close`.
    """

    def __init__(self, path: Path, layout: Layout, mapping: mmap.mmap, lock: int | None) -> None:
        self.path, self.layout = path, layout
        self.namespace, self.slots = layout.namespace, layout.slots
        self.block_bytes, self.slot_bytes = layout.block_bytes, layout.slot_bytes
        self.buffer = memoryview(mapping)[layout.data : layout.file_bytes]
        self._mapping: mmap.mmap | None = mapping
        self._lock = lock  # descriptor
        self._address = address_of(self.buffer)

    @classmethod
    def create(
        cls,
        path: str | Path,
        namespace: str,
        block_bytes: int,
        slots: int,
        *,
        prefault: bool = True,
        huge_pages: bool = True,
        lock: bool = False,
    ) -> "ArenaFile":
        """For the service: open the file, or make it, whole or not at all; and have it alone."""
        path, layout = Path(path), Layout("arena", namespace, block_bytes, slots)
        notes: list[str] = []

        def prepare(descriptor: int) -> mmap.mmap:
            _require_whole(descriptor, layout, path)
            return map_file(
                descriptor,
                layout.file_bytes,
                prefault=prefault,
                huge_pages=huge_pages,
                lock=lock,
                note=notes.append,
            )

        descriptor, mapping = open_alone(path, layout, prepare)
        level = logging.WARNING if any("refused" in note for note in notes) else logging.INFO
        log.log(level, "arena %s: %d slots of %d bytes; %s", path, slots, block_bytes, "; ".join(notes))
        return cls(path, layout, mapping, descriptor)

    @classmethod
    def attach(cls, path: str | Path, namespace: str, *, prefault: bool = True) -> "ArenaFile":
        """For a worker: map what its service has made."""
        path = Path(path)
        try:
            descriptor = open_private(path, os.O_RDWR)
        except OSError as error:
            raise TierUnavailable(
                f"the arena {path} cannot be opened ({error.strerror}): the service and its workers must run as one "
                "user and see the same folder"
            ) from error
        try:
            layout = decode_layout(os.pread(descriptor, PAGE, 0), "arena", path)
            require_same(layout, replace(layout, namespace=namespace), path)
            _require_whole(descriptor, layout, path)
            with in_words(path, layout):
                mapping = map_file(
                    descriptor, layout.file_bytes, prefault=prefault, huge_pages=True, lock=False, note=log.debug
                )
        finally:
            os.close(descriptor)
        return cls(path, layout, mapping, None)

    # -- headers ---------------------------------------------------------------------------------------
    def header(self, slot: int) -> SlotHeader | None:
        """The slot's header; None: damaged, or being written just now."""
        return decode(self.raw_header(slot))

    def raw_header(self, slot: int) -> bytes:
        """The header's 256 bytes: as long as they stay the same, so does the slot."""
        at = self.layout.header_at(self._known(slot))
        return self._mapped[at : at + HEADER_BYTES]

    def write_header(self, slot: int, header: SlotHeader) -> None:
        """For the service alone. The state is written last."""
        at, raw, mapping = self.layout.header_at(self._known(slot)), encode(header), self._mapped
        mapping[at] = IN_TRANSIT
        mapping[at + 1 : at + HEADER_BYTES] = raw[1:]
        mapping[at] = raw[0]

    # -- bytes -----------------------------------------------------------------------------------------
    def slot(self, slot: int) -> memoryview:
        """Writable view of the `block_bytes` bytes of a slot."""
        start = self._known(slot) * self.slot_bytes
        return self.buffer[start : start + self.block_bytes]

    def read(self, slot: int, key: bytes, into: memoryview, *, verify: bool = True) -> bool:
        """Copy the block `key` out of its slot; False: it is not there, or changed meanwhile, or is damaged.

        `into` is writable and contiguous, of `block_bytes`. With False its content is garbage. Other threads run.
        """
        if into.nbytes != self.block_bytes:
            raise ValueError(f"blocks have {self.block_bytes} bytes, not {into.nbytes}")
        before = self.raw_header(slot)
        expected = sealed_checksum(before, key, self.block_bytes)
        if expected is None:
            return False
        ctypes.memmove(address_of(into), self._address + slot * self.slot_bytes, self.block_bytes)
        if verify and checksum(into) != expected:
            return False
        return self.raw_header(slot) == before

    def holds(self, slot: int, key: bytes, *, verify: bool = True) -> bool:
        """Whether the block `key` lies whole in its slot, now. Other threads run while it is verified."""
        expected = sealed_checksum(self.raw_header(slot), key, self.block_bytes)
        return expected is not None and (not verify or checksum(self.slot(slot)) == expected)

    def write(self, slot: int, data: memoryview) -> int:
        """Copy a block into its slot; the checksum of `data`. Other threads run, if `data` is writable."""
        self.put(slot, data)
        return checksum(data)

    def put(self, slot: int, data: memoryview) -> None:
        """As `write`, where the checksum is known."""
        if data.nbytes != self.block_bytes:
            raise ValueError(f"blocks have {self.block_bytes} bytes, not {data.nbytes}")
        start = self._known(slot) * self.slot_bytes
        if data.readonly:
            self.buffer[start : start + self.block_bytes] = data.cast("B")
        else:
            ctypes.memmove(self._address + start, address_of(data), self.block_bytes)

    def close(self) -> None:
        """Let go of the file; the memory goes with the last view of it. Calling it again does nothing."""
        if self._mapping is None:
            return
        if self._lock is not None:
            unlock(self._lock)  # closing is not enough: the mapping has a descriptor of its own
        mapping, self._mapping, self._lock, self._address = self._mapping, None, None, 0
        with suppress(BufferError):  # somebody has views
            self.buffer.release()
            mapping.close()

    # -- within ----------------------------------------------------------------------------------------
    @property
    def _mapped(self) -> mmap.mmap:
        if self._mapping is None:
            raise TierUnavailable(f"the arena {self.path} was closed")
        return self._mapping

    def _known(self, slot: int) -> int:
        """`slot`, if there is such a one: what is outside is no memory of ours."""
        if not 0 <= slot < self.slots or self._mapping is None:
            raise TierUnavailable(f"the arena {self.path} has {self.slots} slots, or was closed: no slot {slot}")
        return slot


def _require_whole(descriptor: int, layout: Layout, path: Path) -> None:
    size = os.fstat(descriptor).st_size
    if size != layout.file_bytes:
        raise ArenaRefused(
            f"{path} has {size} bytes instead of {layout.file_bytes}, something has cut it: delete it (it holds "
            "nothing but cached blocks)"
        )
