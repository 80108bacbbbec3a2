"""The experts: each names contexts that may come next, and how strongly it thinks so.

An expert that counts says ln(1 + p/ε) of the share p that it has seen, shrunk where it has seen little (PPM's escape:
Cleary & Witten 1984); one that ranks or marks says 1. Experts that know nothing of a candidate say nothing, so its
opinions are few. What the opinions are worth is learnt in `predict/mixture.py`.
"""

from bisect import bisect_right
from math import log1p

from kvprefetch.predict.counts import Row
from kvprefetch.predict.memory import RECENT, Session, Tenant
from kvprefetch.predict.mixture import Opinions
from kvprefetch.predict.names import LONGEST, Parts, ending

_EPS = 0.02
_MOST = 80  # candidates
_PLAIN = 2.0  # strength of an opinion that can be near certain: what it is worth is learnt the faster
_NAMES: list[str] = []
_START: list[float] = []


def _opinion(name: str, start: float = 0.0) -> int:
    _NAMES.append(name)
    _START.append(start)
    return len(_NAMES) - 1


def _ranks(name: str, count: int, start: float = 0.0) -> list[int]:
    return [_opinion(name, start) for _ in range(count)]


AFTER_TWO = _opinion("followed these two", 0.2)
AFTER_ONE = _opinion("followed this one", 0.2)
USER_AFTER = _opinion("followed this one with this user", 0.2)
TOGETHER = _ranks("used together", 3, 0.2)
SIGNAL = _opinion("followed this signal", 0.2)
NAMED = [_opinion("named by the latest signal", 0.7), *_ranks("named by a signal", 3, 0.2)]
POPULAR = _opinion("popular", 0.2)
USER_LATELY = _opinion("used lately by this user", 0.2)
LATELY = _opinion("used lately in this session", 0.2)
RECENCY = _ranks("recent in this session", 8, 0.2)
IN_BURST = _ranks("touched in this act", 4)
NEXT_NAME = _ranks("next by name", 8)
SAME_FOLDER = _opinion("in the same folder", 0.3)
NEXT_ALIKE = _ranks("next of the same subject", 4, 0.2)
EARLIER_ALIKE = _opinion("earlier of the same subject", 0.1)
SAME_BASE = _opinion("of the same name elsewhere", 0.1)
SAME_ENDING = _opinion("of the same type", 0.1)
EARLIER_NAME = _opinion("earlier by name in this act")
LAST_KIND = _ranks("by its last use", 8)
LAST_AT = _ranks("by the time of its last use", 8)
NEVER = _opinion("never used", -1.0)
STEM_LATELY = _opinion("its subject used lately", 0.1)
SHAPE, BESIDE, ELSEWHERE = (_opinion(f"as others: {what}", 0.2) for what in ("same subject", "beside it", "elsewhere"))
NOTHING = _opinion("none of these", 3.0)
NOTHING_AT_START = _opinion("none of these, at a start")
NOTHING_SURE = _opinion("none of these, where much is known")

NAMES = tuple(_NAMES)
START = tuple(_START)
_STEP = tuple(rank if rank < 4 else 4 + (rank >= 6) + (rank >= 10) + (rank >= 16) for rank in range(RECENT))
_AGES = (30.0, 120.0, 600.0, 3600.0, 6 * 3600.0, 24 * 3600.0, 7 * 24 * 3600.0)  # s, between the LAST_AT


def _all_marks() -> list[tuple[tuple[int, float], ...]]:
    """What can be said of a candidate and the latest one, by `_mark`: made once, as it is said of all candidates."""
    places: tuple[list[int], ...] = ([], [SAME_FOLDER], [SAME_BASE])
    marks = []
    for place in places:
        for same_ending in ([], [SAME_ENDING]):
            for earlier in ([], [EARLIER_NAME]):
                for kind in LAST_KIND:
                    for age in (*LAST_AT, NEVER):
                        said = (*place, *same_ending, *earlier, kind, age)
                        marks.append(tuple((which, 1.0) for which in said))
    return marks


_MARKS = _all_marks()
_BY_ANALOGY = (SHAPE, BESIDE, ELSEWHERE)


class Candidates(dict[str, Opinions]):
    """Opinions by context; at most _MOST contexts, what is named first stays."""

    def say(self, context: str, which: int, strength: float = 1.0) -> None:
        """One opinion."""
        opinions = self.get(context)
        if opinions is not None:
            opinions.append((which, strength))
        elif len(self) < _MOST:
            self[context] = [(which, strength)]

    def count(self, row: Row | None, which: int, prior: float) -> float:
        """What a row of counts says; and how much of it is evidence, 0…1."""
        if row is None or not row.counts:
            return 0.0
        total = row.total + prior * row.unit
        scale = 1 / (total * _EPS)
        for context, count in row.counts.items():
            opinion = which, log1p(count * scale)
            if context in self:
                self[context].append(opinion)
            elif len(self) < _MOST:
                self[context] = [opinion]
        return row.total / total


def opinions_on(tenant: Tenant, session: Session) -> tuple[Candidates, Opinions]:
    """What may come next in the session; and what speaks for none of them."""
    found = Candidates()
    for back, context in enumerate(reversed(session.named)):
        found.say(context, NAMED[min(back, 3)], _PLAIN)
    sure = _followers(found, tenant, session)
    _recent(found, session)
    if session.trail:
        _by_name(found, tenant, session)
    _habits(found, tenant, session)
    if session.trail:
        _marks(found, tenant, session)
    none = [(NOTHING, 1.0), (NOTHING_SURE, sure)]
    if not session.trail:
        none.append((NOTHING_AT_START, 1.0))
    return found, none


def _followers(found: Candidates, tenant: Tenant, session: Session) -> float:
    """Variable-order transitions, with this user and with everyone, and what was used about the same time."""
    trail = session.trail
    last = trail[-1] if trail else ""
    sure = 0.0
    if len(trail) > 1:
        sure = found.count(tenant.after_two.row((trail[-2], last)), AFTER_TWO, 0.5)
    sure += found.count(tenant.after_one.row(last), AFTER_ONE, 1.0)
    found.count(tenant.user_after.row((session.user, last)), USER_AFTER, 1.0)
    found.count(tenant.signals.row((session.kind, session.about)), SIGNAL, 1.0)
    for back, context in enumerate(list(trail)[: -len(TOGETHER) - 1 : -1]):
        found.count(tenant.together.row(context), TOGETHER[back], 1.0)
    return sure


def _recent(found: Candidates, session: Session) -> None:
    """What the session used, by how lately and how often."""
    burst = session.burst
    for rank, context in enumerate(reversed(session.recent.order)):
        found.say(context, RECENCY[_STEP[rank]])
        if context in burst:
            found.say(context, IN_BURST[min(rank, 3)])
    found.count(session.recent.lately, LATELY, 0.0)


def _by_name(found: Candidates, tenant: Tenant, session: Session) -> None:
    """What lies beside the latest one."""
    last = session.trail[-1]
    parts = tenant.parts(last)
    for off, context in enumerate(tenant.names.after(last, len(NEXT_NAME))):
        found.say(context, NEXT_NAME[off])
    later, earlier = tenant.names.alike(last, parts.stem, 6)
    for off, context in enumerate(later):
        found.say(context, NEXT_ALIKE[min(off, 3)])
    for context in earlier:
        found.say(context, EARLIER_ALIKE)
    _by_analogy(found, tenant, parts)


def _by_analogy(found: Candidates, tenant: Tenant, last: Parts) -> None:
    """What would be to the latest one as others were to theirs: its test, say, even if there never was one."""
    for which, key in enumerate(last.analogies()):
        row = tenant.analogies.row((which, key)) if key else None
        if row is not None:
            scale = 1 / ((row.total + row.unit) * _EPS)
            for other, count in row.counts.items():
                name = last.transferred(which, other)
                if len(name) <= LONGEST:
                    found.say(name, _BY_ANALOGY[which], log1p(count * scale))


def _habits(found: Candidates, tenant: Tenant, session: Session) -> None:
    """What this user, and everyone, used lately. Most of it is only named where little else is known."""
    few = 3 if session.trail else RECENT
    user = tenant.users.get(session.user)
    for row, which in ((user.lately if user else None, USER_LATELY), (tenant.popular, POPULAR)):
        if row is None or not row.counts:
            continue
        counts, scale = row.counts, 1 / (row.total * _EPS)
        for context in sorted(counts, key=counts.__getitem__)[-few:]:
            if context not in found and len(found) < _MOST:
                found[context] = []
        for context in found.keys() & counts.keys():
            found[context].append((which, log1p(counts[context] * scale)))


def _marks(found: Candidates, tenant: Tenant, session: Session) -> None:
    """What each candidate has in common with the latest one, and what was last done with it and when."""
    last, known, now = session.trail[-1], tenant.known, tenant.at
    here, name, kind, *_ = tenant.parts(last)
    in_act = len(session.burst) > 1
    stems, scale = session.stems.counts, 1 / (session.stems.total * _EPS)
    for context, opinions in found.items():
        latest = known.get(context)
        if latest is not None:
            its_folder, its_name, its_kind, stem, *_ = latest.parts
            use, age = latest.use, bisect_right(_AGES, now - latest.at)
            if stem in stems:
                opinions.append((STEM_LATELY, log1p(stems[stem] * scale)))
        else:
            its_folder, _, its_name = context.rpartition("/")
            its_kind, use, age = ending(its_name), 0, len(LAST_AT)
        place = 1 if its_folder == here else 2 if its_name == name else 0
        mark = ((place * 2 + (its_kind == kind)) * 2 + (in_act and context < last)) * len(LAST_KIND) + use
        opinions += _MARKS[mark * (len(LAST_AT) + 1) + age]
