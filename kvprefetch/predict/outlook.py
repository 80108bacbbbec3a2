"""What the predictor says about one context, for the planner."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outlook:
    """When a context will be used: from the predictor."""

    within: float  # P(used before the hold ends)
    before_ready: float  # P(used before the work is done)
    residency: float  # E[min(X, hold)]
    hold_s: float
    index: float  # the best P ÷ E[min] of any hold, per second
