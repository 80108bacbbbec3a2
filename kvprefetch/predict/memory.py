"""What is remembered of one tenant's contexts, users and sessions. Bounded; nothing of it leaves the tenant."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from kvprefetch.predict.counts import Counts, Row
from kvprefetch.predict.names import Names, Parts, parts_of, short

RECENT = 24
"""Distinct contexts that a session or a user remembers in order."""
TRAIL = 5
"""Latest uses that a session remembers, repeated ones too."""
BURST_S = 1.0
"""Uses closer than this are one act, such as a commit or a turn's parallel tool calls."""
_KINDS = 7
_KEPT = 32  # popular contexts
_MENTIONS = 12  # contexts named by signals that a session remembers


class Recent:
    """Distinct contexts, the latest last, and how much each was used lately. At most RECENT; about 4 KB."""

    __slots__ = ("lately", "order")

    def __init__(self) -> None:
        self.order: list[str] = []
        self.lately = Row()

    def add(self, context: str) -> None:
        """Used again."""
        if context in self.order:
            self.order.remove(context)
        elif len(self.order) >= RECENT:
            del self.order[0]
        self.order.append(context)
        self.lately.add(context, 1.1, RECENT)


@dataclass(slots=True, eq=False)
class Known:
    """A context that was used; about 1 KB with its places in `Names`, and its name three times."""

    parts: Parts
    use: int = 0  # the latest kind of use, by number
    at: float = 0.0  # of the latest use


@dataclass(slots=True, eq=False)
class Session:
    """What a session did lately; at most about 8 KB."""

    user: str
    recent: Recent = field(default_factory=Recent)
    trail: deque[str] = field(default_factory=lambda: deque(maxlen=TRAIL))  # the latest last
    burst: set[str] = field(default_factory=set)  # contexts of the act in progress, at most RECENT
    at: float = 0.0  # of its latest event
    kind: str = ""  # of its latest event
    about: str = ""  # the subject of its latest event
    named: list[str] = field(default_factory=list)  # known contexts that signals named since their last use
    stems: Row = field(default_factory=Row)  # subjects of what it used


class Tenant:
    """All that is remembered of one tenant.

    With names of usual length at most 6 KB a context, 8 KB a session and 5 KB a user: 140 MB where 20,000 contexts
    were each used often by 2,000 users; `max_contexts` is for who has many such tenants.
    """

    def __init__(self, max_contexts: int = 20_000, max_sessions: int = 2_000) -> None:
        self.max_contexts, self.max_sessions = max_contexts, max_sessions
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        self.users: OrderedDict[str, Recent] = OrderedDict()
        self.names = Names()
        self.at = 0.0  # of the latest event
        self.known: OrderedDict[str, Known] = OrderedDict()  # contexts, the one used last at the end
        self.numbers: dict[str, int] = {}  # of kinds; 0 for any beyond
        self.popular = Row()
        self.after_one = Counts(growth=1.06, width=16, max_rows=max_contexts)
        self.after_two = Counts(growth=1.06, width=8, max_rows=max_contexts)
        self.user_after = Counts(growth=1.06, width=12, max_rows=max_contexts)
        self.together = Counts(growth=1.03, width=16, max_rows=max_contexts)
        self.signals = Counts(growth=1.03, width=8, max_rows=max_contexts)
        self.analogies = Counts(growth=1.03, width=8, max_rows=max_contexts)  # see `Parts.analogy`

    def session(self, name: str, user: str) -> Session:
        """The session, made if it is new; the one longest quiet makes room."""
        session = self.sessions.get(name)
        if session is None:
            session = self.sessions[name] = Session(user)
            if len(self.sessions) > self.max_sessions:
                self.sessions.popitem(last=False)
        self.sessions.move_to_end(name)
        return session

    def observed(self, session: Session, kind: str, about: str, now: float) -> None:
        """Something happened in the session that may tell what comes next."""
        if now - session.at > BURST_S:
            session.burst.clear()
        session.kind, session.about, session.at, self.at = kind, short(about), now, now
        for name in self.names.named_in(about) if about else ():
            if name in session.named:
                session.named.remove(name)
            session.named.append(name)
        del session.named[:-_MENTIONS]

    def used(self, session: Session, context: str, kind: str, now: float) -> None:
        """The session used `context`; "" if there is no name to remember."""
        if now - session.at > BURST_S:
            session.burst.clear()
        if context:
            self._learn(session, context, kind, now)
        session.kind, session.about, session.at, self.at = kind, context, now, now

    def _learn(self, session: Session, context: str, kind: str, now: float) -> None:
        self.signals.add((session.kind, session.about), context)
        known = self._know(context, kind, now)
        self._follow(session, context)
        session.stems.add(known.parts.stem, 1.15, _MENTIONS)
        self.popular.add(context, 1.01, _KEPT)
        session.trail.append(context)
        session.recent.add(context)
        self._user(session.user).add(context)
        if len(session.burst) < RECENT:
            session.burst.add(context)
        if context in session.named:
            session.named.remove(context)

    def _follow(self, session: Session, context: str) -> None:
        trail, user = session.trail, session.user
        last = trail[-1] if trail else ""
        self.after_one.add(last, context)
        self.user_after.add((user, last), context)
        if len(trail) > 1:
            self.after_two.add((trail[-2], last), context)
        if last and last != context:
            which, key, other = self.parts(last).analogy(self.known[context].parts)
            if key:
                self.analogies.add((which, key), other)
        for other in dict.fromkeys(trail):  # a set would have another order in another process
            if other != context:
                self.together.add(other, context)
                self.together.add(context, other)

    def parts(self, context: str) -> Parts:
        """What its name is made of, be it remembered or not."""
        known = self.known.get(context)
        return known.parts if known is not None else parts_of(context)

    def _know(self, context: str, kind: str, now: float) -> Known:
        known = self.known.get(context)
        if known is None:
            while len(self.known) >= self.max_contexts:
                forgotten, its = self.known.popitem(last=False)
                self.names.drop(forgotten, its.parts)
            known = self.known[context] = Known(parts_of(context))
            self.names.add(context, known.parts)
        if kind not in self.numbers and len(self.numbers) < _KINDS:
            self.numbers[kind] = len(self.numbers) + 1
        known.use, known.at = self.numbers.get(kind, 0), now
        self.known.move_to_end(context)
        return known

    def _user(self, user: str) -> Recent:
        recent = self.users.get(user)
        if recent is None:
            recent = self.users[user] = Recent()
            if len(self.users) > self.max_sessions:
                self.users.popitem(last=False)
        self.users.move_to_end(user)
        return recent
