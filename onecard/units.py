"""Numbers as people read them."""
import math

GIB = 2**30


def number(x):
    """Three digits at least: 0.0123, 4.57, 205, 1,234."""
    if x >= 999.5:
        return f"{x:,.0f}"
    return f"{x:.3g}"


def amount(n):
    """A count: 12.34 G, 696.5 M, 5,668."""
    if n >= 1e9:
        return f"{n / 1e9:,.2f} G"
    if n >= 1e5:
        return f"{n / 1e6:,.1f} M"
    return f"{n:,.0f}"


def gib(n_bytes):
    """An amount of memory: 4.8 GiB, 71 MiB; "-" if it is unknown."""
    if n_bytes == math.inf:
        return "-"
    if n_bytes < 0.1 * GIB:
        return f"{n_bytes / 2**20:,.0f} MiB"
    return f"{n_bytes / GIB:,.1f} GiB"


def period(shortest, longest):
    """A range of seconds in words: "4.57 to 7.2 s", "13.3 to 20.9 days"."""
    unit, size = "s", 1
    for name, n_seconds in (("minutes", 60), ("hours", 3600), ("days", 86400)):
        if longest >= 2 * n_seconds:
            unit, size = name, n_seconds
    numbers = [number(shortest / size), number(longest / size)]
    if numbers[0] == numbers[1]:
        return f"{numbers[0]} {unit}"
    return f"{numbers[0]} to {numbers[1]} {unit}"
