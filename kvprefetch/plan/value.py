"""What a preload is worth (DESIGN §7.2), in seconds of TTFT, with every term named."""

from dataclasses import dataclass

from kvprefetch.predict.outlook import Outlook


@dataclass(frozen=True, slots=True)
class Value:
    """The terms of V. `saves` − `delays` − `occupies` is what acting is worth."""

    probability: float  # that the context is used while it is held
    kept: float  # the share of it that the request will still begin with
    ready: float  # the share of it that is there when the request comes
    saves: float  # p · w · kept · ready · Δ
    delays: float  # λ·d·δ/2: what live requests wait for a step in progress
    occupies: float  # μ · n · b · E[min(X, τ)], in the units of Δ
    hold_s: float  # τ

    @property
    def total(self) -> float:
        """V, in seconds."""
        return self.saves - self.delays - self.occupies

    @property
    def because(self) -> str:
        """The terms in words."""
        return (
            f"V={self.total:.4g}s: p={self.probability:.2f} kept={self.kept:.2f} ready={self.ready:.2f} "
            f"saves={self.saves:.4g}s delays={self.delays:.3g}s occupies={self.occupies:.3g}s hold={self.hold_s:.3g}s"
        )


@dataclass(frozen=True, slots=True)
class Load:
    """What is now known of the live load. Rates per second, times in seconds."""

    arrivals: float = 0.0  # λ
    step_s: float = 0.02  # δ, the longest that a live request waits for a speculative step
    price: float = 0.0  # index of the marginal block, per second: what a second of its memory is worth to others


def value_of(outlook: Outlook, saved_s: float, work_s: float, kept: float, weight: float, load: Load) -> Value:
    """V of a job of `work_s` that saves `saved_s` when all of it is ready. What is half done is worth half."""
    ready = 1 - 0.5 * outlook.before_ready / outlook.within if outlook.within > 0 else 0.0
    return Value(
        probability=outlook.within,
        kept=kept,
        ready=ready,
        saves=outlook.within * weight * kept * ready * saved_s,
        delays=load.arrivals * work_s * load.step_s / 2,
        occupies=load.price * saved_s * outlook.residency,
        hold_s=outlook.hold_s,
    )
