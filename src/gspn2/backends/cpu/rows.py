"""The maths of one line, in vectors: tap weights, one step of the scan, one step of its adjoint.

A row is a pointer to the first place of a line in scratch. One place to the left and to the right of a line
may be read and hold 0. Loops run to the end of the last vector. Beyond the last place weights, inputs, states
and what is carried are 0: what would follow there from a neighbour inside the line is 0 times that neighbour,
and cut off, because it is NaN when the neighbour is not finite.
"""

from __future__ import annotations

import math
from typing import Any

from .jit import jit
from .simd import (
    LANES,
    fma,
    is_double,
    keep_below,
    load,
    load_as,
    load_first,
    lower_of,
    replace_lane,
    round_to_int,
    splat,
    store,
    store_as,
    store_first,
    two_to_the,
    upper_of,
)

_LOG2_E = 1 / math.log(2)
# ln 2 in two parts: the first has few enough bits that n times it is exact in float32.
_LN2_HIGH = 0.693145751953125
_LN2_LOW = math.log(2) - _LN2_HIGH
_FACTORIAL = tuple(float(math.factorial(n)) for n in range(14))
_FAR_BELOW = -1e30


@jit
def exp(x: Any, like: Any) -> Any:
    """e^x for |x| up to 80 (float32) or 700 (float64), to a few units in the last place."""
    n = round_to_int(x * splat(_LOG2_E, like))
    r = fma(n, splat(-_LN2_HIGH, like), x)
    r = fma(n, splat(-_LN2_LOW, like), r)
    # Taylor in Horner's form; |r| <= ln(2) / 2, so degree 7 reaches float32 and degree 13 float64.
    p = splat(1 / _FACTORIAL[7], like)
    if is_double(like):
        p = splat(1 / _FACTORIAL[13], like)
        p = fma(p, r, splat(1 / _FACTORIAL[12], like))
        p = fma(p, r, splat(1 / _FACTORIAL[11], like))
        p = fma(p, r, splat(1 / _FACTORIAL[10], like))
        p = fma(p, r, splat(1 / _FACTORIAL[9], like))
        p = fma(p, r, splat(1 / _FACTORIAL[8], like))
        p = fma(p, r, splat(1 / _FACTORIAL[7], like))
    p = fma(p, r, splat(1 / _FACTORIAL[6], like))
    p = fma(p, r, splat(1 / _FACTORIAL[5], like))
    p = fma(p, r, splat(1 / _FACTORIAL[4], like))
    p = fma(p, r, splat(1 / _FACTORIAL[3], like))
    p = fma(p, r, splat(0.5, like))
    p = fma(p, r, splat(1.0, like))
    p = fma(p, r, splat(1.0, like))
    return p * two_to_the(n)


@jit
def normalize_taps(w: Any, tap: int, slope: Any, places: int, like: Any) -> None:
    """Three rows of logits a_k, `tap` elements apart, become weights sigmoid(a_k) / sum sigmoid(a), in place.

    With m = min(0, max a) and E_k = e^m + e^(m - a_k), sigmoid(a_k) is e^m / E_k: the weights are the 1 / E_k
    over their sum, which never is 0; multiplied out, to save the inverses. A missing neighbour gets weight 0.
    Rows of `slope`, where there are any, receive w_k (1 - sigmoid(a_k)), which the adjoint needs.
    """
    zero = splat(0.0, like)
    far_below = splat(_FAR_BELOW, like)
    # A relative weight below e^-gap counts as that: the product of two E must not overflow. `exp` bounds how
    # close to 1 a sigmoid may come before its slope counts as that of the bound.
    gap = splat(300.0, like) if is_double(like) else splat(40.0, like)
    closest = splat(-700.0, like) if is_double(like) else splat(-80.0, like)
    for j in range(0, places, LANES):
        a0 = replace_lane(load(w, j), -j, far_below)
        a1 = load(w, tap + j)
        a2 = replace_lane(load(w, 2 * tap + j), places - 1 - j, far_below)
        m = lower_of(upper_of(upper_of(a1, a0), a2), zero)
        low = exp(upper_of(m, zero - gap), like)
        e0 = exp(upper_of(lower_of(m - a0, gap), closest), like)
        e1 = exp(upper_of(lower_of(m - a1, gap), closest), like)
        e2 = exp(upper_of(lower_of(m - a2, gap), closest), like)
        s0, s1, s2 = low + e0, low + e1, low + e2
        p0, p1, p2 = s1 * s2, s0 * s2, s0 * s1
        total = p0 + p1 + p2
        left = places - j
        w0 = keep_below(replace_lane(p0 / total, -j, zero), left)
        w1 = keep_below(p1 / total, left)
        w2 = keep_below(replace_lane(p2 / total, places - 1 - j, zero), left)
        store(w, j, w0)
        store(w, tap + j, w1)
        store(w, 2 * tap + j, w2)
        if slope is not None:
            store(slope, j, w0 * e0 / s0)
            store(slope, tap + j, w1 * e1 / s1)
            store(slope, 2 * tap + j, w2 * e2 / s2)


@jit
def last_vector(places: int) -> Any:
    """Where the last vector of a row begins, whole or not."""
    return (places - 1) // LANES * LANES


@jit
def clear_missing_taps(w: Any, tap: int, places: int, like: Any) -> None:
    """Set what belongs to missing neighbours to 0 in three rows of weights as given, or of tap gradients."""
    zero = splat(0.0, like)
    last = last_vector(places)
    store(w, 0, replace_lane(load(w, 0), 0, zero))
    store(w, 2 * tap + last, replace_lane(load(w, 2 * tap + last), places - 1 - last, zero))


@jit
def start_row(h: Any, x: Any, lam: Any, places: int) -> None:
    """h = lam x: the first line of a segment. A null `lam` is 1."""
    if lam is None:
        for j in range(0, places, LANES):
            store(h, j, load(x, j))
    else:
        for j in range(0, places, LANES):
            store(h, j, load(lam, j) * load(x, j))


@jit
def from_neighbours(previous: Any, w: Any, tap: int, s: Any, j: int) -> Any:
    """s + sum_k w_k[j] previous[j + k], a vector from place j on."""
    s = fma(load(w, j), load(previous, j - 1), s)
    s = fma(load(w, tap + j), load(previous, j), s)
    return fma(load(w, 2 * tap + j), load(previous, j + 1), s)


@jit
def scan_row(h: Any, previous: Any, w: Any, tap: int, x: Any, lam: Any, places: int) -> None:
    """h[j] = sum_k w_k[j] previous[j + k] + lam[j] x[j]."""
    last = last_vector(places)
    for j in range(0, last, LANES):
        s = load(x, j) if lam is None else load(lam, j) * load(x, j)
        store(h, j, from_neighbours(previous, w, tap, s, j))
    s = load(x, last) if lam is None else load(lam, last) * load(x, last)
    store(h, last, keep_below(from_neighbours(previous, w, tap, s, last), places - last))


@jit
def scan_line(
    y: Any, add: bool, h: Any, previous: Any, w: Any, tap: int, x: Any, lam: Any, has_lam: bool, gate: Any,
    has_gate: bool, restart: bool, places: int, like: Any,
) -> None:  # fmt: skip
    """A whole step on lines of tensors, without scratch between: h as in `scan_row`, y = or += gate h.

    x, lam and gate are lines as stored, y one in the arithmetic type. Rounds exactly as the staged steps do.
    """
    for j in range(0, places, LANES):
        count = places - j
        whole = count >= LANES
        s = load_as(x, j, like) if whole else load_first(x, j, count, like)
        if has_lam:
            s = (load_as(lam, j, like) if whole else load_first(lam, j, count, like)) * s
        if not restart:
            s = from_neighbours(previous, w, tap, s, j)
        state = s
        if has_gate:
            s = (load_as(gate, j, like) if whole else load_first(gate, j, count, like)) * s
        if add:
            s = (load_as(y, j, like) if whole else load_first(y, j, count, like)) + s
        if whole:
            store(h, j, state)
            store_as(y, j, s)
        else:
            store(h, j, keep_below(state, count))
            store_first(y, j, count, s)


@jit
def gate_row(y: Any, gate: Any, h: Any, places: int) -> None:
    """y = gate h."""
    for j in range(0, places, LANES):
        store(y, j, load(gate, j) * load(h, j))


@jit
def adjoint_row(g: Any, carried: Any, dy: Any, gate: Any, places: int) -> None:
    """g = gate dy + carried: everything that reaches this line of the state. A null `gate` is 1."""
    for j in range(0, places, LANES):
        s = load(dy, j)
        if gate is not None:
            s = load(gate, j) * s
        store(g, j, load(carried, j) + s)


@jit
def to_neighbours(w: Any, tap: int, g: Any, j: int) -> Any:
    """sum_k w_k[j - k] g[j - k], a vector from place j on."""
    s = load(w, tap + j) * load(g, j)
    s = fma(load(w, j + 1), load(g, j + 1), s)
    return fma(load(w, 2 * tap + j - 1), load(g, j - 1), s)


@jit
def carry_row(carried: Any, w: Any, tap: int, g: Any, places: int) -> None:
    """carried[j] = sum_k w_k[j - k] g[j - k]: what this line hands to the previous one."""
    last = last_vector(places)
    for j in range(0, last, LANES):
        store(carried, j, to_neighbours(w, tap, g, j))
    store(carried, last, keep_below(to_neighbours(w, tap, g, last), places - last))


@jit
def tap_gradient_row(dw: Any, tap: int, g: Any, previous: Any, places: int) -> None:
    """dw_k[j] += g[j] previous[j + k]."""
    for j in range(0, places, LANES):
        s = load(g, j)
        store(dw, j, fma(s, load(previous, j - 1), load(dw, j)))
        store(dw, tap + j, fma(s, load(previous, j), load(dw, tap + j)))
        store(dw, 2 * tap + j, fma(s, load(previous, j + 1), load(dw, 2 * tap + j)))


@jit
def input_gradient_row(x: Any, lam: Any, gate: Any, dy: Any, g: Any, h: Any, places: int) -> None:
    """Replace the rows of x, lam and gate by their gradients g lam, g x and dy h. Null rows stand for 1."""
    for j in range(0, places, LANES):
        s = load(g, j)
        if lam is None:
            store(x, j, s)
        else:
            dlam = s * load(x, j)
            store(x, j, s * load(lam, j))
            store(lam, j, dlam)
        if gate is not None:
            store(gate, j, load(dy, j) * load(h, j))


@jit
def logit_gradient_row(dw: Any, tap: int, w: Any, slope: Any, places: int) -> None:
    """Replace the three rows dw_k by the gradient of the logits, slope_k (dw_k - sum_m w_m dw_m)."""
    for j in range(0, places, LANES):
        d0, d1, d2 = load(dw, j), load(dw, tap + j), load(dw, 2 * tap + j)
        mean = load(w, j) * d0
        mean = fma(load(w, tap + j), d1, mean)
        mean = fma(load(w, 2 * tap + j), d2, mean)
        store(dw, j, load(slope, j) * (d0 - mean))
        store(dw, tap + j, load(slope, tap + j) * (d1 - mean))
        store(dw, 2 * tap + j, load(slope, 2 * tap + j) * (d2 - mean))


@jit
def zero_fill(row: Any, count: int, like: Any) -> None:
    """Zero `count` elements, a multiple of LANES."""
    for j in range(0, count, LANES):
        store(row, j, splat(0.0, like))
