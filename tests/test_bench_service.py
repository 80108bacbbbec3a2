"""The benches of the service: what they compute from what they measured, and their copies on a small scale."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import service_socket
import torch
from results_format import Results
from routing import FollowUp, Given, row_of
from service_arena import measure
from service_client import chain, schedule
from service_lookup import percentile
from service_lookup import row_of as row_of_look_ups

from kvprefetch.client.handle import Prefetch
from kvprefetch.outcomes import Use
from kvprefetch.tiers.device import PageShape


def test_an_open_loop_asks_at_its_mean_rate_whatever_the_answers_take() -> None:
    times = schedule(rate=50, seconds=100, seed=1)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 100
    assert mean(len(schedule(50, 100, seed)) for seed in range(5)) == pytest.approx(5_000, rel=0.05)
    assert times != schedule(rate=50, seconds=100, seed=2)


def test_chains_of_different_seeds_share_no_key() -> None:
    assert len({*chain(100, 1), *chain(100, 2)}) == 200
    assert chain(3, 1) == chain(3, 1)


def test_percentiles_of_one_value_are_that_value() -> None:
    assert percentile([2.5], 99) == 2.5
    assert percentile([float(value) for value in range(101)], 99) == 99.0


def test_a_row_of_look_ups_counts_all_clients() -> None:
    order = {"keys": 64, "lease": True, "rate": 10, "seconds": 2}
    one = {"look_ups": [1.0, 3.0], "releases": [0.5, 0.5], "late": 1, "seconds": 2.0}
    other = {"look_ups": [2.0, 60.0], "releases": [0.5, 0.7], "late": 0, "seconds": 2.0}
    row = row_of_look_ups(order, [one, other])
    assert (row["n"], row["clients"], row["load"]) == (4, 2, "paced")
    assert (row["look_ups_per_s"], row["asked_per_s"]) == (2.0, 20)
    assert (row["p50_ms"], row["max_ms"], row["over_50_ms"], row["began_late"]) == (2.5, 60.0, 1, 1)


def test_as_fast_as_they_can_is_another_load() -> None:
    answer = {"look_ups": [1.0], "releases": [], "late": 0, "seconds": 0.5}
    row = row_of_look_ups({"keys": 1, "lease": False, "rate": 0, "seconds": 0.5}, [answer])
    assert row["load"] == "saturated"
    assert not {"asked_per_s", "release_p50_ms"} & row.keys()


def test_copies_out_of_an_arena_are_timed_beside_memcpy(tmp_path: Path) -> None:
    shape = PageShape(layers=2, kv_heads=1, head_dim=64, block_tokens=16, dtype=torch.float32)
    row = measure(tmp_path, shape, blocks=8, rounds=2)
    assert (row["block_bytes"], row["blocks"], row["rounds"]) == (shape.bytes, 8, 2)
    assert row["load_over_memcpy"] > 0
    assert row["load_checksum_over_memcpy"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_plain_socket_brings_as_many_bytes_as_were_asked_for() -> None:
    program = [sys.executable, service_socket.__file__]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        assert sender.stdin is not None
        port = int(sender.stdout.readline().rpartition(" ")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            memory = memoryview(bytearray(100_000))
            service_socket.receive(connection, memory)
            service_socket.receive(connection, memory[:10])
        assert bytes(memory) == b"\x5a" * 100_000
        sender.stdin.close()


def given(place: str, use: Use) -> Given:
    handle = Prefetch(lambda _: None)
    handle.note_use(use, 0)
    return Given(handle, place)


def test_a_row_of_routing_tells_right_places_from_others() -> None:
    found = [
        FollowUp(0.1, 1.0, given("device", Use.USED), is_right=True),
        FollowUp(0.3, 1.0, given("device", Use.UNUSED), is_right=False),
        FollowUp(0.2, 0.9, given("host", Use.USED), is_right=False),
    ]
    row = row_of("random", True, found)
    assert (row["placed_device"], row["placed_host"]) == (2, 1)
    assert (row["device_right"], row["host_right"]) == (0.5, 0.0)
    assert (row["ttft_p50_right_s"], row["ttft_p50_elsewhere_s"]) == (0.1, 0.25)
    assert row["uses"] == {"USED": 2, "UNUSED": 1}


def test_without_hints_nothing_was_placed() -> None:
    row = row_of("sticky", False, [FollowUp(0.5, 0.8), FollowUp(0.7, 0.6)])
    assert (row["ttft_p50_s"], row["cached_share"], row["follow_ups"]) == (0.6, 0.7, 2)
    assert not any("placed" in name for name in row)


def test_what_is_absent_is_said_and_the_rest_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import service
    from service_node import Absent

    def absent() -> None:
        raise Absent("there is no redis-benchmark on the PATH")

    results = Results("service", 0)
    service._section("redis", absent, results)
    service._section("arena", lambda: results.figures.update(arena_over_memcpy=0.9), results)
    results.write(tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["figures"] == {"arena_over_memcpy": 0.9}
    assert [row.get("not_measured") for row in written["rows"]] == ["there is no redis-benchmark on the PATH", None]
    assert "no redis-benchmark" in capsys.readouterr().out
