"""Real processes, dead and alive in all their ways."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nodes import eventually, run

from kvprefetch.service import watch
from kvprefetch.service.watch import Watch, is_alive, start_time

A, B = b"a" * 16, b"b" * 16


@contextmanager
def process() -> Iterator["subprocess.Popen[bytes]"]:
    """One that waits."""
    popen = subprocess.Popen(["sleep", "60"])
    try:
        yield popen
    finally:
        popen.kill()
        popen.wait()


@pytest.fixture(params=["pidfd", "no pidfd"])
def eyes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With pidfds, and where there are none."""
    if request.param == "no pidfd":
        monkeypatch.delattr(os, "pidfd_open")
    return str(request.param)


def test_this_process_is_alive(eyes: str) -> None:
    started = start_time(os.getpid())
    assert started is not None
    assert is_alive(os.getpid(), started)


def test_a_process_that_started_at_another_time_is_another_process(eyes: str) -> None:
    assert not is_alive(os.getpid(), (start_time(os.getpid()) or 0) + 1)


def test_a_stopped_process_is_alive(eyes: str) -> None:
    with process() as popen:
        started = start_time(popen.pid) or 0
        os.kill(popen.pid, signal.SIGSTOP)
        assert is_alive(popen.pid, started)


def test_one_that_was_killed_is_dead_before_its_parent_has_noticed(eyes: str) -> None:
    with process() as popen:
        started = start_time(popen.pid) or 0
        popen.kill()
        os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert not is_alive(popen.pid, started)
        popen.wait()
        assert not is_alive(popen.pid, started)


def test_one_whose_first_thread_has_ended_is_alive(eyes: str, tmp_path: Path) -> None:
    """Its memory is still there, and another thread of it may write."""
    program = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); "
    program += "print('here', flush=True); ctypes.CDLL(None).pthread_exit(None)"
    popen = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert popen.stdout is not None
        popen.stdout.readline()
        started = start_time(popen.pid) or 0
        stat = Path(f"/proc/{popen.pid}/stat")

        async def story() -> None:
            await eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")

        run(story())
        assert is_alive(popen.pid, started)
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


def test_a_name_with_brackets_and_spaces_misleads_nobody(tmp_path: Path) -> None:
    program = tmp_path / "a) R (1 2"
    program.symlink_to("/bin/sleep")
    popen = subprocess.Popen([str(program), "60"])
    try:
        assert is_alive(popen.pid, start_time(popen.pid) or 0)
    finally:
        popen.kill()
        popen.wait()


def test_a_death_is_told_once(eyes: str) -> None:
    async def story() -> None:
        told: list[bytes] = []
        watch = Watch(told.append, poll_s=0.01)
        with process() as first, process() as second:
            watch.add(A, first.pid, start_time(first.pid) or 0)
            watch.add(B, second.pid, start_time(second.pid) or 0)
            watch.add(A, first.pid, start_time(first.pid) or 0)
            await asyncio.sleep(0.05)
            assert told == []
            first.kill()
            await eventually(lambda: told == [A])
            await asyncio.sleep(0.05)
            assert told == [A]
            assert len(watch) == 1
        await eventually(lambda: told == [A, B])
        watch.close()

    run(story())


def test_one_that_is_dead_already_is_told_as_well(eyes: str) -> None:
    async def story() -> None:
        told: list[bytes] = []
        watch = Watch(told.append, poll_s=0.01)
        with process() as popen:
            started = start_time(popen.pid) or 0
        watch.add(A, popen.pid, started)
        watch.add(B, os.getpid(), 1)
        assert told == []
        await eventually(lambda: sorted(told) == [A, B])
        watch.close()

    run(story())


def test_one_that_is_watched_no_longer_is_not_told(eyes: str) -> None:
    async def story() -> None:
        told: list[bytes] = []
        watch = Watch(told.append, poll_s=0.01)
        with process() as popen:
            watch.add(A, popen.pid, start_time(popen.pid) or 0)
            watch.remove(A)
        await asyncio.sleep(0.05)
        assert told == []
        watch.close()
        watch.close()

    run(story())


def test_watching_leaves_no_descriptor_behind() -> None:
    async def story() -> None:
        before = len(os.listdir("/proc/self/fd"))
        watch = Watch(lambda instance: None)
        with process() as popen:
            for _ in range(5):
                watch.add(A, popen.pid, start_time(popen.pid) or 0)
                watch.remove(A)
                watch.add(B, popen.pid, 1)
                await asyncio.sleep(0)
                assert is_alive(popen.pid, start_time(popen.pid) or 0)
        watch.close()
        assert len(os.listdir("/proc/self/fd")) == before

    run(story())


def test_a_process_that_may_not_be_looked_at_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc shows other users nothing."""
    monkeypatch.setattr(watch, "_stat", lambda pid: None)
    assert is_alive(os.getpid(), 7)
    monkeypatch.delattr(os, "pidfd_open")
    assert is_alive(os.getpid(), 7)
