"""The line between a worker and its service is slow, narrow, silent or cut."""

import time

from faults_case import Campaign
from faults_drive import ask_all, joined, known, shared
from faults_node import Node, Worker
from faults_proxy import Proxy, Weather

_NAMES = (r"far\..*arena_read_total\{(unavailable|timed_out)\}", r"far\..*lookup_missed.*\{(timed_out|unavailable)\}")
_SLOW = (*_NAMES, r"far\..*lookup_found_blocks_total\{loaded\}", r"far\..*arena_read_total\{loaded\}")
_WEATHERS = {  # what, how, the counters that name it
    "delayed by 5 ms": (Weather(delay_s=0.005), _SLOW),  # within what a look-up may take: it is served
    "delayed by 200 ms": (Weather(delay_s=0.2), _NAMES),
    "narrow, 20 kB/s": (Weather(bytes_per_s=20_000), _NAMES),
    "silent": (Weather(is_held=True), _NAMES),
    "cut after 200 bytes": (Weather(cut_after=200), _NAMES),
}


def run(campaign: Campaign, node: Node, one: Worker) -> None:
    """All cases. The node's service runs."""
    proxy = Proxy(node.port)
    far = node.start_worker("far", address=f"127.0.0.1:{proxy.port}")
    try:
        assert far.url
        joined(node)
        for what, (weather, names) in _WEATHERS.items():
            if campaign.is_quick and what not in ("silent", "delayed by 200 ms"):
                continue
            with campaign.case("network between worker and service", what, [node], names) as case:
                shared(case, one, far)
                prompts = known(case, one, 6)
                proxy.weather = weather
                if weather.cut_after:
                    proxy.cut()
                ask_all(case, [far], 6, prompts)
                time.sleep(0.5)
                ask_all(case, [far], 2, known(case, one, 2))
                proxy.clear()
                joined(node)
                shared(case, one, far)
                shared(case, far, one)
        with campaign.case("network between worker and service", "cut every 200 ms", [node], _NAMES) as case:
            with case.load([one, far]):
                for _ in range(10):
                    time.sleep(0.2)
                    proxy.cut()
            joined(node)
            shared(case, one, far)
    finally:
        node.end_worker(far)
        proxy.close()
