"""Every tier, a file system that is soon full, and real Redis servers."""

import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from conformance_tiers import BLOCK, TIERS, Clock, Open, Place, Wish
from redis_servers import RedisCluster, RedisServer


@pytest.fixture(params=TIERS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """`opened(slots, block_bytes)`: an empty tier of this kind; it is closed, and its books checked, at the end."""
    places: list[Place] = []
    numbers = count()

    def open_it(slots: int = 8, block_bytes: int = BLOCK) -> Place:
        folder = tmp_path / str(next(numbers))
        folder.mkdir(mode=0o700)
        places.append(TIERS[request.param](Wish(slots, block_bytes, folder, request, Clock())))
        return places[-1]

    yield open_it
    for place in places:
        if not place.is_closed:
            place.tier.check()
        place.tier.close()
        place.tier.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 512 KiB; skipped where it cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not allowed")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests: use a namespace of your own, and do it no harm."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three nodes for all tests: use a namespace of your own, and do them no harm."""
    with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
