"""The header by which a request is asked in a group's name."""

from dataclasses import replace
from typing import Any

from served import ASKED, Open, served
from test_gate import KNOWN

from kvprefetch.settings import GroupSettings


def test_a_group_is_named_in_a_header_by_its_tenants_alone(open_tiny: Open) -> None:
    groups = (GroupSettings("law", ("ann",)),)
    with served(open_tiny(), credentials=KNOWN, groups=groups) as site:

        def ask(tenant: str, namespace: str, **more: Any) -> Any:
            headers = {"authorization": f"Bearer token of {tenant}", "X-KVPrefetch-Namespace": namespace}
            return site.http.post("/chat/completions", json={**ASKED, **more}, headers=headers)

        for more in ({}, {"max_tokens": 0}):
            for tenant, namespace, status in (
                ("ann", "group:law", 200),
                ("bob", "group:law", 403),
                ("ann", "group:sales", 403),
                ("ann", "public", 403),
                ("ann", "private", 400),
                ("ann", "group:", 400),
                ("ann", "", 200),
            ):
                answer = ask(tenant, namespace, **more)
                assert answer.status_code == status, (tenant, namespace, answer.text)
        site.kv.clear()
        ask("ann", "group:law")
        site.kv.core.regroup((replace(groups[0], tenants=("ann", "bob")),))
        assert ask("bob", "").json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
