"""The learning rates of the settings that are compared at their best one, found on a seed that doesn't count.

Each setting is trained at every rate of FACTORS, times the suite's. While the best rate is the lowest or the highest
one tried, the rate beyond it is tried, too, up to LIMITS. The best one has the most good videos and, among equals, the
lowest velocity error.
"""

import math

from benchmarks.ablations.settings import TUNING_SEED, Setting

FACTORS = (0.25, 0.5, 1.0)
LIMITS = (1 / 16, 4.0)


def missing(rows: list[dict], setting: Setting) -> list[float]:
    """Return the factors that are to be tried next, none if the best one is known."""
    tried = trials(rows, setting)
    if left := [factor for factor in FACTORS if factor not in tried]:
        return left
    found = best(rows, setting)
    beyond = {min(tried): found / 2, max(tried): found * 2}.get(found)
    return [] if beyond is None or not LIMITS[0] <= beyond <= LIMITS[1] else [beyond]


def best(rows: list[dict], setting: Setting) -> float | None:
    """Return the best factor of those that were tried, None for a setting whose rate isn't tuned."""
    if setting.tuned is None:
        return None
    tried = trials(rows, setting)
    return max(tried, key=lambda factor: (tried[factor]["good"], -tried[factor].get("own_state_error", math.inf)))


def trials(rows: list[dict], setting: Setting) -> dict[float, dict]:
    """Return the rows of the tuning by their factor."""
    return {
        row["rate_factor"]: row
        for row in rows
        if row["seed"] == TUNING_SEED and row["setting"] == setting.tuned and "rate_factor" in row
    }
