"""Background thresholds of CAMs, and the background exponents (alpha) that have the same effect. Needs no torch.

With a threshold x, a pixel is background where its largest map is at most x. With an exponent a, the background score
of a pixel is (1 - the largest map)^a, and both agree where (1 - x)^a = x.
"""
import math

MOST = 100.     # the highest exponent that the scripts take


def exponent_of(threshold):
    """Returns the background exponent with the same effect as a threshold in (0, 1)."""
    return math.log(threshold) / math.log(1 - threshold)


def threshold_of(exponent):
    """Returns the threshold in (0, 1) with the same effect as a background exponent above 0."""
    low, high = 0., 1.
    for _ in range(60):         # bisection, as (1 - x)^a - x falls with x
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - middle) ** exponent > middle else (low, middle)
    return low


def exponents_to_start_with(threshold):
    """Returns (low, high, walk): the CRF exponents for train_aff.py and the exponent of the random walk to start with,
    for the best threshold in (0, 1). Their ratios to the threshold's own exponent are those of the original's defaults:
    its threshold is 0.26, with the exponent 4.5, and the three are 4, 24 and 6. They are kept within what the scripts
    accept; low and high differ in their first decimal."""
    low, high, walk = (min(max(factor * exponent_of(threshold), .1), MOST) for factor in (.9, 5.4, 1.35))
    return min(low, MOST / 2), max(high, .2), walk
