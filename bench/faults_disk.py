"""The disk behind the arena is full, read-only, cut, emptied and rotten; the service dies while it writes there."""

import os
import random
import resource
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from faults_case import Campaign, Case
from faults_drive import ask_all, halted, joined, known
from faults_node import Node, Worker
from faults_process import small_disk, until

from kvprefetch.tiers.layout import PAGE, Layout, decode
from kvprefetch.tiers.slots import HEADER_BYTES

_FULL = (r"tiers\.disk\.tier\.failed", r"tiers\.disk\.counters\.unavailable")
_CORRUPT = (r"tiers\.disk\.tier\.(corrupt|unreadable|damaged)",)
_REFUSED = (r"\.refused\..* disk",)
_DISK = 24 * 2**20


def run(campaign: Campaign) -> None:
    """All cases, on a node of their own whose arena is small."""
    folder = campaign.folder / "small-disk"
    with small_disk(folder, _DISK) as is_mounted:
        node = Node(
            campaign.folder / "disk-node",
            campaign.folder / "model",
            "disk",
            arena="2MiB",
            more=f'[disk]\ndir = "{folder}/blocks"\nsize = "16MiB"',
        )
        try:
            node.serve(halting=True)
            one, two = node.start_worker("disk-one"), node.start_worker("disk-two")
            assert one.url
            assert two.url
            joined(node)
            _Cases(campaign, node, one, two, folder, is_mounted).run()
        finally:
            node.close()


class _Cases:
    def __init__(
        self, campaign: Campaign, node: Node, one: Worker, two: Worker, folder: Path, is_mounted: bool
    ) -> None:
        self.campaign, self.node, self.one, self.two = campaign, node, one, two
        self.folder, self.is_mounted = folder, is_mounted
        self._random = random.Random(len(campaign.rows))

    @property
    def path(self) -> Path:
        """The tier's file."""
        (path,) = (self.folder / "blocks").glob("*.blocks")
        return path

    def run(self) -> None:
        """All of them; each heals what it broke."""
        self._full()
        self._rotten()
        if not self.campaign.is_quick:
            self._killed()
            self._unusable()

    def _full(self) -> None:
        with self.campaign.case("disk full", "while writing", [self.node], _FULL) as case:
            self._round(case, lambda: None)
            filler = self.folder / "filler"
            if self.is_mounted:
                _fill(filler)
            else:  # the same to whoever writes: no file may grow beyond a few slots more
                self._limit(self.path.stat().st_blocks * 512)
            ask_all(case, [self.one, self.two], 6)
            self._round(case, lambda: None)
            filler.unlink(missing_ok=True)
            self._limit(resource.RLIM_INFINITY)
            self._shares(case)

    def _rotten(self) -> None:
        spoils: dict[str, Callable[[], None]] = {
            "a bit flipped in each block": self._flip_blocks,
            "cut while it is used": lambda: os.truncate(self.path, self._layout().data),
        }
        for what, spoil in spoils.items():
            with self.campaign.case("disk file", what, [self.node], _CORRUPT) as case:
                self._spoil(case, spoil)
                self._shares(case)
        with self.campaign.case("disk file", "emptied while it is used", [self.node], _CORRUPT) as case:
            self._spoil(case, lambda: os.truncate(self.path, 0))
            self._shares(case)
            case.look([self.node])
            self._while_down(self.path.unlink)  # it has no header any more
            self._shares(case)
        at_rest: dict[str, Callable[[], None]] = {
            "headers flipped while the service is down": self._flip_headers,
            "cut while the service is down": lambda: os.truncate(self.path, self._layout().data),
        }
        for what, spoil in at_rest.items():
            with self.campaign.case("disk file", what, [self.node], _CORRUPT) as case:
                self._round(case, partial(self._while_down, spoil))
                self._shares(case)

    def _killed(self) -> None:
        names = (r"arena_read_total\{(unavailable|timed_out)\}",)
        for step in ("storing", "promoting"):
            with self.campaign.case("service SIGKILL", f"{step}, disk", [self.node], names) as case:
                self._shares(case)
                service = self.node.service
                assert service is not None
                prompts = self._pushed_out(case)
                drive = partial(known, case, self.one, 1) if step == "storing" else partial(self._read, case, prompts)
                with halted(case, self.node.orders, service, step, drive):
                    ask_all(case, [self.one, self.two], 2)
                    service.kill()
                    ask_all(case, [self.one, self.two], 2)
                self.node.serve(halting=True)
                joined(self.node)
                self._read(case, prompts)
                self._shares(case)

    def _unusable(self) -> None:
        """At a start; the service does without, and says so."""
        blocks = self.folder / "blocks"
        faults: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "its header overwritten": (lambda: _overwrite(self.path), lambda: self.path.unlink()),
        }
        if self.is_mounted:
            faults["on a read-only file system"] = (
                lambda: _remount(self.folder, "ro"),
                lambda: _remount(self.folder, "rw"),
            )
        faults["its folder open to others"] = (lambda: blocks.chmod(0o777), lambda: blocks.chmod(0o700))
        for what, (spoil, heal) in faults.items():
            with self.campaign.case("disk file", what, [self.node], _REFUSED) as case:
                self._shares(case)
                self._while_down(spoil)
                until(lambda: "disk" in str(self.node.stats()["refused"]), "a disk that is not used is not told", 20)
                case.look([self.node])
                self._round(case, lambda: None)
                self._while_down(heal)
                self._shares(case)

    # -- within ----------------------------------------------------------------------------------------
    def _round(self, case: Case, spoil: Callable[[], None]) -> None:
        """Documents go to the disk and out of the arena; then, after `spoil`, they are read."""
        prompts = self._pushed_out(case)
        spoil()
        self._read(case, prompts)

    def _spoil(self, case: Case, spoil: Callable[[], None]) -> None:
        """Rounds, until something that was spoilt is read: which blocks leave the arena is its own affair."""
        before = self._bad()
        for _ in range(6):
            self._round(case, spoil)
            if self._bad() > before:
                return

    def _bad(self) -> int:
        namespaces = self.node.stats()["namespaces"].values()
        tiers = [namespace["tiers"]["disk"]["tier"] for namespace in namespaces]
        return sum(tier.get("corrupt", 0) + tier.get("unreadable", 0) for tier in tiers)

    def _layout(self) -> Layout:
        with self.path.open("rb") as file:
            return decode(file.read(PAGE), "disk", self.path)

    def _pushed_out(self, case: Case) -> list[list[int]]:
        prompts = known(case, self.one, 4)
        known(case, self.one, 8)  # more than the arena holds
        return prompts

    def _read(self, case: Case, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            case.ask(self.two, prompt)

    def _shares(self, case: Case) -> None:
        """Wait until a document comes back from the disk."""
        before = self._promoted()
        deadline = time.monotonic() + 20.0  # a breaker waits up to 10 s
        while time.monotonic() < deadline:
            self._read(case, self._pushed_out(case))
            if self._promoted() != before:
                return
        case.complain("nothing comes back from the disk any more")

    def _promoted(self) -> int:
        return sum(n["promoted"].get("disk", 0) for n in self.node.stats()["namespaces"].values())

    def _while_down(self, spoil: Callable[[], None]) -> None:
        assert self.node.service is not None
        self.node.service.stop()
        spoil()
        self.node.serve(halting=True)
        joined(self.node)

    def _limit(self, size: int) -> None:
        assert self.node.service is not None
        resource.prlimit(self.node.service.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def _flip_blocks(self) -> None:
        with self.path.open("r+b") as file:
            layout = self._layout()
            for slot in range(layout.slots):
                _flip(file.fileno(), layout.slot_at(slot) + self._random.randrange(layout.block_bytes))

    def _flip_headers(self) -> None:
        with self.path.open("r+b") as file:
            layout = self._layout()
            for slot in range(0, layout.slots, 2):
                _flip(file.fileno(), layout.header_at(slot) + self._random.randrange(HEADER_BYTES))


def _flip(descriptor: int, at: int) -> None:
    byte = os.pread(descriptor, 1, at)
    if byte:
        os.pwrite(descriptor, bytes([byte[0] ^ 0x10]), at)


def _fill(path: Path) -> None:
    """Until there is no room left at all."""
    size = 2**16
    with path.open("wb", buffering=0) as file:
        while size >= 1:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"somebody else's file" * 10)


def _remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True, capture_output=True)
