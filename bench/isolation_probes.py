"""The attacks: for each, a victim that does one of two things, and what the attacker sees of it.

A probe is `(world, bit) → {surface: sight}`. Where the bit is set the victim has sent what the attacker looks for,
else something else of the same length, by a request, a hint or a signal. A sight is all that the attacker is shown,
numbers that merely measure time apart; those have surfaces of their own, as numbers.
"""

import json
import re
import time
from collections.abc import Callable, Hashable
from typing import Any

from isolation_world import ATTACKER, BLOCK, GROUP, VICTIM, World

from kvprefetch.client.handle import Prefetch as RemoteHint
from kvprefetch.contexts import Context, Sampling
from kvprefetch.errors import KVPrefetchError
from kvprefetch.worker.hints import Prefetch as LocalHint

Hint = LocalHint | RemoteHint
Sights = dict[str, Hashable]
Probe = Callable[[World, bool], Sights]
SECONDS = "seconds"
"""A surface whose name ends so is a number: less means that something was there."""
_BLOCKS = 8  # of what the victim sends
_WAIT_S = 60.0
_PATIENCE_S = 0.05  # for a preload: one that does not pay now may wait for seconds
_ONE = Sampling(max_tokens=1)


# -- what was sent -----------------------------------------------------------------------------------------
def ask(world: World, bit: bool) -> Sights:
    """Send it oneself: how much of it was cached, in how many steps, and when the first token came."""
    probe = _guess(world, _victim_sends(world, bit))
    before, began = world.forwards, time.perf_counter()
    done = world.attacker.generate(token_ids=probe, max_tokens=1, ignore_eos=True).result()
    seconds, steps = time.perf_counter() - began, world.forwards - before
    usage = (done.prompt_tokens, done.reused_tokens, done.loaded_tokens, len(done.tokens), str(done.finish_reason))
    return {"tokens": usage, "steps": steps, "tokens_seconds": seconds}


def ask_later(world: World, bit: bool) -> Sights:
    """As `ask`, when the worker's pool has forgotten all, and the node's arena has it."""
    wanted = _victim_sends(world, bit)
    world.written()
    world.local.clear()
    done = world.attacker.generate(token_ids=_guess(world, wanted), max_tokens=1, ignore_eos=True).result()
    return {"arena_tokens": (done.reused_tokens, done.loaded_tokens)}


def hint(world: World, bit: bool) -> Sights:
    """Hint at it, at the worker or at the service: what becomes of that, and how soon."""
    probe, began = _guess(world, _victim_sends(world, bit)), time.perf_counter()
    to = world.attacker if world.random.random() < 0.5 else world.by_service(ATTACKER)
    given = to.prefetch(Context(token_ids=tuple(probe)), hold_s=5.0)
    is_done = _settles(given)
    seconds = time.perf_counter() - began
    world.attacker.generate(token_ids=probe, max_tokens=1).result()  # hints that never come true are soon not believed
    given.cancel()
    result = given.wait(_WAIT_S)
    sight = (is_done, result.outcome.name, result.tokens, _plain(result.reason), _plain(given.because))
    return {"hints": sight, "hints_seconds": seconds}


def stats(world: World, bit: bool) -> Sights:
    """One's own figures: how the victim's doing changes them, and how one's own asking for it does."""
    before = _own_figures(world)
    wanted = _victim_sends(world, bit)
    world.written()
    between = _own_figures(world)
    world.attacker.generate(token_ids=_guess(world, wanted), max_tokens=1, ignore_eos=True).result()
    world.written()
    after = _own_figures(world)
    return {"stats": (_changes(before, between), _changes(between, after))}


def errors(world: World, bit: bool) -> Sights:
    """Everything that is refused: names that the victim may have given, hints that it may have, too much of a text."""
    named, other = (f"document {world.random.getrandbits(64):x}" for _ in range(2))
    wanted = _victim_sends(world, bit, named if bit else other)
    probe = _guess(world, wanted)
    attacker, service = world.attacker, world.by_service(ATTACKER)
    attempts: tuple[Callable[[], Any], ...] = (
        lambda: attacker.context(name=named),
        lambda: service.prefetch(service.context(name=named), hold_s=5.0).wait(_WAIT_S),
        lambda: attacker.generate(token_ids=probe * 20, max_tokens=1),
        lambda: attacker.generate(token_ids=probe, max_tokens=0),
        lambda: attacker.prefetch(Context(token_ids=tuple(probe), namespace="public")),
        lambda: attacker.generate(token_ids=[*probe, -1], max_tokens=1),
    )
    return {"errors": tuple(_refusal(attempt).replace(named, "NAME") for attempt in attempts)}


CONTENT: tuple[Probe, ...] = (ask, ask_later, hint, stats, errors)
"""On each surface of these the attacker must do no better than a coin."""


# -- what is known to show ---------------------------------------------------------------------------------
def busy(world: World, bit: bool) -> Sights:
    """Occupancy: is the victim busy? Fill all that is lent, and see how much of one's own is left."""
    return {"busy": _left_of_mine(world, bit, blocks=80)}


def busy_within_guarantee(world: World, bit: bool) -> Sights:
    """The same by who keeps to its guarantee."""
    return {"busy_within_guarantee": _left_of_mine(world, bit, blocks=16)}


def member(world: World, bit: bool) -> Sights:
    """Has the other member of a group asked it in the group's name?"""
    wanted, other = world.text(_BLOCKS), world.text(_BLOCKS)
    sent = wanted if bit else other
    world.victim.generate(token_ids=[*sent, 1], max_tokens=1, namespace=f"group:{GROUP}").result()
    done = world.attacker.generate(token_ids=[*wanted, 1], max_tokens=1).result()
    return {"group_member": done.reused_tokens}


def public_use(world: World, bit: bool) -> Sights:
    """Has the victim used a public context? There is room for all."""
    return {"public_use": _of_public(world, bit)}


def public_use_under_pressure(world: World, bit: bool) -> Sights:
    """The same, looked at after the attacker has filled the pool."""
    return {"public_use_under_pressure": _of_public(world, bit, flood=True)}


# -- within ------------------------------------------------------------------------------------------------
def _victim_sends(world: World, bit: bool, name: str = "") -> list[int]:
    """The victim sends what the attacker looks for, or else another text; the former."""
    wanted, other = world.text(_BLOCKS), world.text(_BLOCKS)
    context = Context(token_ids=tuple(wanted if bit else other), name=name)
    way, session = world.random.randrange(5), f"s{world.random.randrange(4)}"
    if name:
        world.victim.context(token_ids=context.token_ids, name=name)
    if world.random.random() < 0.5:
        world.local.clear()  # where there is room, every preload pays
    if way in (1, 2):
        _settles(world.by_service(VICTIM).prefetch(context, session=session, hold_s=5.0))
    elif way in (3, 4):
        world.victim.signal("document_opened", session=session, contexts=[context])
        _wait_for_speculation(world)
    if way in (0, 1, 3):
        prompt = [*context.token_ids, 1]
        world.victim.generate(token_ids=prompt, session=session, max_tokens=2, ignore_eos=True).result()
    return wanted


def _wait_for_speculation(world: World) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and world.local.worker.call(lambda: bool(world.local.worker.preloads.jobs)):
        time.sleep(0.0005)


def _settles(hint: Hint) -> bool:
    """Whether it has an outcome soon."""
    try:
        hint.wait(_PATIENCE_S)
    except TimeoutError:
        return False
    return True


def _guess(world: World, wanted: list[int]) -> list[int]:
    """The exact text, or a beginning of it that goes on in another way."""
    kept = world.random.choice([_BLOCKS, world.random.randint(1, _BLOCKS)])
    return [*wanted[: kept * BLOCK], *world.text(_BLOCKS - kept), 1]


def _left_of_mine(world: World, bit: bool, blocks: int) -> int:
    """Tokens that are left of `blocks` of the attacker's when the victim has sent as much as the pool holds, or not."""
    world.local.clear()
    mine = [[*world.text(8), 1] for _ in range(blocks // 8)]
    for prompt in mine:
        world.attacker.generate(token_ids=prompt, max_tokens=1).result()
    if bit:
        for _ in range(world.local.worker.pool.pages // 8):
            world.victim.generate(token_ids=[*world.text(8), 1], max_tokens=1).result()
    pool = world.local.worker.pool  # asking would tell the same, one prompt at a time, and change it
    return sum(len(pool.match(world.local.core.request(p, _ONE, 0.0, ATTACKER).sequence.keys)) for p in mine)


def _of_public(world: World, bit: bool, *, flood: bool = False) -> Hashable:
    world.local.clear()
    handbook, other = (Context(token_ids=tuple(world.text(_BLOCKS)), namespace="public") for _ in range(2))
    for context in (handbook, other):
        world.local.prefetch(context, hold_s=300.0).wait(_WAIT_S)
    used = handbook if bit else other
    world.victim.generate(token_ids=[*used.token_ids, 1], max_tokens=1).result()
    probe = world.attacker.prefetch(Context(token_ids=handbook.token_ids), hold_s=5.0)
    outcome = probe.wait(_WAIT_S)
    for _ in range(world.local.worker.pool.pages // 8 - 1 if flood else 0):
        world.attacker.generate(token_ids=[*world.text(8), 1], max_tokens=1).result()
    probe_use = probe.use
    done = world.attacker.generate(token_ids=[*handbook.token_ids, 1], max_tokens=1).result()
    return outcome.outcome.name, outcome.tokens, str(probe_use), done.reused_tokens


def _own_figures(world: World) -> dict[str, Any]:
    figures = world.by_service(ATTACKER).stats()
    del figures["client"]
    return figures


def _changes(before: Any, after: Any) -> str:
    """By how much each number has changed, as text."""

    def walk(one: Any, two: Any) -> Any:
        if isinstance(two, dict):
            both = one if isinstance(one, dict) else {}
            changed = {key: walk(both.get(key, 0), value) for key, value in two.items()}
            return {key: value for key, value in changed.items() if value}
        return two - one if isinstance(two, (int, float)) else str(two)

    return json.dumps(walk(before, after), sort_keys=True)


def _plain(text: str) -> str:
    """Without its numbers: those that say when and how fast differ from probe to probe by themselves."""
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "N", text)


def _refusal(attempt: Callable[[], Any]) -> str:
    try:
        return f"granted: {type(attempt()).__name__}"
    except KVPrefetchError as error:
        return f"{type(error).__name__}: {error}"
