"""What followed what: counts that forget, bounded in rows and in width."""

from collections import OrderedDict
from collections.abc import Hashable

_RESCALE = 1e12  # units grow as old counts fade; beyond this a row is divided by its unit


class Row:
    """Faded counts of what followed one thing, at most `width` of them: the lightest makes room for the new.

    Rather than fading every old count at each new one, the unit that a new one counts for grows.
    """

    __slots__ = ("counts", "total", "unit")

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.total = 0.0  # of all that was ever added, faded; not less than the sum of `counts`
        self.unit = 1.0

    def add(self, context: str, growth: float, width: int) -> None:
        """One more. `growth` ≥ 1: how much the unit grows."""
        counts = self.counts
        self.unit *= growth
        counts[context] = counts.get(context, 0.0) + self.unit
        self.total += self.unit
        if len(counts) > width:
            del counts[min(counts, key=counts.__getitem__)]
        if self.unit > _RESCALE:
            scale = 1 / self.unit
            self.counts = {name: count * scale for name, count in counts.items()}
            self.total *= scale
            self.unit = 1.0


class Counts:
    """Rows by key, at most `max_rows`: the one longest unused makes room."""

    def __init__(self, growth: float, width: int, max_rows: int) -> None:
        self.growth, self.width, self.max_rows = growth, width, max_rows
        self.rows: OrderedDict[Hashable, Row] = OrderedDict()

    def add(self, key: Hashable, context: str) -> None:
        """`context` followed `key` once more."""
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = Row()
            if len(self.rows) > self.max_rows:
                self.rows.popitem(last=False)
        else:
            self.rows.move_to_end(key)
        row.add(context, self.growth, self.width)

    def row(self, key: Hashable) -> Row | None:
        """What followed `key`; only to be read."""
        return self.rows.get(key)
