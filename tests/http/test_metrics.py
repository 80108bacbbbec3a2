"""/metrics says what the endpoint saw and what the worker's books say."""

from prometheus_client.parser import text_string_to_metric_families
from served import ASKED, HANDBOOK, MODEL, QUESTION, Open, Served, served


def numbers(site: Served) -> dict[tuple[str, ...], float]:
    """Every sample, by its name and its labels' values."""
    text = site.http.get(site.url.removesuffix("/v1") + "/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_requests_are_counted_by_how_their_prompt_was_found(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        first, *_ = [site.post("chat/completions", **ASKED).json()["usage"] for _ in range(3)]
        site.post("completions", model="gpt-4", prompt="x")
        seen = numbers(site)
    assert seen["kvprefetch_ttft_seconds_count", "cold"] == 1
    assert seen["kvprefetch_ttft_seconds_count", "device"] == 2
    assert seen["kvprefetch_ttft_seconds_count", "host"] == 0
    assert seen["kvprefetch_ttft_seconds_sum", "cold"] > 0
    assert seen["kvprefetch_prompt_tokens_total",] == 3 * first["prompt_tokens"]
    assert 0 < seen["kvprefetch_cached_tokens_total", "device"] < 2 * first["prompt_tokens"]
    assert seen["kvprefetch_generated_tokens_total",] == 3 * 8
    assert seen["kvprefetch_http_requests_total", "chat", "200"] == 3
    assert seen["kvprefetch_http_requests_total", "completions", "404"] == 1
    assert seen["kvprefetch_live_requests",] == 0


def test_the_workers_books_are_there(open_tiny: Open) -> None:
    with served(open_tiny()) as site:
        site.post("chat/completions", model=MODEL, messages=[HANDBOOK, QUESTION], max_tokens=0)
        site.post("chat/completions", **ASKED)
        seen, stats = numbers(site), site.kv.stats()
    assert seen["kvprefetch_prefetch_outcomes_total", "warm"] == 1
    assert seen["kvprefetch_prefetch_uses_total", "used"] == 1
    assert seen["kvprefetch_prefetch_tokens_total", "computed"] == stats["prefetch"]["tokens_computed"] > 0
    assert seen["kvprefetch_lookup_found_blocks_total", "hits"] == stats["lookups"]["hits"] > 0
    missed = {labels[1]: n for labels, n in seen.items() if labels[0] == "kvprefetch_lookup_missed_blocks_total"}
    assert len(missed) == 8
    assert sum(missed.values()) == sum(stats["lookups"]["misses"].values())
    pages = {labels[1]: n for labels, n in seen.items() if labels[0] == "kvprefetch_pool_pages"}
    assert sum(pages.values()) == stats["pool"]["pages"]
    (info,) = [set(labels[1:]) for labels in seen if labels[0] == "kvprefetch_worker_info"]
    assert info == {MODEL, "cpu", stats["backend"]}
