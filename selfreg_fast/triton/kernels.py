"""The exit-loss matrix in Triton: two kernels for the mathematics, four small ones around them, and two in resize.py.

    phase 0   what the means divide by, what a pixel gives to the gradient      count_kernel, norms_kernel
    phase 1   statistics of the teachers, then of every exit                    exit_rows_kernel or exit_blocks_kernel
    phase 2   losses and gradients                                              the same
    phase 3   sums over programs, in a fixed order, in float64                  finish_kernel, total_kernel

`exit_rows_kernel` keeps the channels of a pixel in registers: teachers first, whose target rows stay, then one exit
after the other, read once. `exit_blocks_kernel` walks over the channels in blocks, twice, with the same block of all
exits at hand: for rows too long, float64, and teachers that learn, which need all their students' logits at once. With
X, the columns of a tile, both interpolate exits smaller than the output, and `exit_blocks_kernel` larger ones; how is
in resize.py.

Mathematics: csrc/pixel_math.h, derivations: selfreg_fast/reference.py. Notation: m = max_c z_c, y = z - m <= 0,
e = exp(y), u = exp(y / tau); a teacher's target is q = factor u, and P = sum_c q_c. A, the type of the arithmetic, is
float32, or float64 for float64 exits.
"""

import triton
import triton.language as tl

from . import resize
from .resize import picked, row_of, widened

RAW = tl.constexpr(0)  # sigma(t)^(1/tau), of temperature 1 too
RENORMALIZED = tl.constexpr(1)  # softmax(t / tau)
ARGMAX = tl.constexpr(2)  # one-hot of argmax t

PIXELS = tl.constexpr(0)  # neighbouring pixels are neighbours in memory (NCHW)
CHANNELS = tl.constexpr(1)  # neighbouring channels are (channels_last)
ROWS = tl.constexpr(2)  # and one pixel's channels follow another's

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.402823466e38)  # where a running maximum starts: finite, for -inf - (-inf) is NaN


# ---- reading ---------------------------------------------------------------------------------------------------------


@triton.jit
def _pixel_weights(labels, pixel_weight, j, inside, C, ignore_index, MASK_SOFT: tl.constexpr, A: tl.constexpr):
    """Weights of pixels j in label losses and in soft losses, and their labels, 0 where there is none.

    A label that is neither a class nor ignored makes the weight NaN: the loss says so, and nothing is read there.
    """
    if pixel_weight is not None:
        soft = tl.load(pixel_weight + j, mask=inside, other=0.0).to(A)
    else:
        soft = inside.to(A)
    label = tl.full(j.shape, 0, A)
    k = tl.full(j.shape, 0, tl.int32)
    if labels is not None:
        given = tl.load(labels + j, mask=inside, other=0).to(tl.int64)  # in 64 bits nothing wraps around
        valid = inside & (given != ignore_index)
        known = (given >= 0) & (given < C)
        label = tl.where(valid, tl.where(known, soft, float("nan")), 0.0).to(A)
        k = tl.where(valid & known, given, 0).to(tl.int32)
        if MASK_SOFT:
            soft = label
    return label, soft, k


@triton.jit
def _class_weight(class_weight, c, C, A: tl.constexpr):
    if class_weight is not None:
        return tl.load(class_weight + c, mask=c < C, other=0.0).to(A)
    else:
        return (c < C).to(A)


@triton.jit
def _product(k, y):
    """k y, and 0 where k is: what y is, be it infinite or NaN, is left out, as in 0 log 0 = 0."""
    return tl.where(k == 0, 0.0, k * y)


# ---- losses ----------------------------------------------------------------------------------------------------------


@triton.jit
def _enter(loss, weight, entry, gains, losses, partials, j, inside, pixels, programs, program, GRADIENT: tl.constexpr):
    """Puts an entry of the matrix: the weighted loss to the map, or its sum over the tile to this program's place.

    Returns the gradient of the result with respect to the unweighted loss of every pixel, where it is asked for.
    """
    weighted = _product(weight, loss)
    if partials is None:
        tl.store(losses + entry * pixels + j, weighted, mask=inside)
    else:
        tl.store(partials + entry * programs + program, tl.sum(weighted, 0))
    if not GRADIENT:
        return weight
    elif partials is None:
        return _product(weight, tl.load(gains + entry * pixels + j, mask=inside, other=0.0))
    else:
        return _product(weight, tl.load(gains + entry))


@triton.jit
def _enter_nothing(entry, losses, partials, j, inside, pixels, programs, program, A: tl.constexpr):
    if partials is None:
        tl.store(losses + entry * pixels + j, tl.full(j.shape, 0.0, A), mask=inside)
    else:
        tl.store(partials + entry * programs + program, 0.0)


# ---- phases 1 and 2 --------------------------------------------------------------------------------------------------

SIZES = ["C", "H", "W", "tiles", "pixels", "programs", "ignore_index", "temperature", "label_smoothing"]


@triton.jit
def _tile(
    strides, i, b, start, W, ORDER: tl.constexpr, ROWWISE: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Where a tile lies in tensor i: its beginning, the step between channels, and from there its pixels and numbers.

    The first two are scalars in 64 bits. Strides are coded as the launcher says.
    """
    step_b, step, step_h, step_w = row_of(strides, i)
    first = b * tl.multiple_of(step_b, VEC)
    x = tl.arange(0, BP)
    if ROWWISE:
        place = (start + x) // W * step_h + (start + x) % W * step_w
    elif ORDER == PIXELS:
        first += start
        place = x.to(tl.int64)
    else:
        first += start * step_w
        place = x * step_w
    if ORDER == PIXELS:
        step = tl.multiple_of(step, VEC)
        tile = place[None, :] + (tl.arange(0, BC) * step)[:, None]
    else:
        step = tl.full([], 1, tl.int64)
        tile = place[None, :] + tl.arange(0, BC)[:, None]
    return first, step, (place if WIDE else place.to(tl.int32)), (tile if WIDE else tile.to(tl.int32))


@triton.jit
def _channels_of(x, other, last: tl.constexpr, LAST: tl.constexpr):
    """A tile of a row, with a constant where there is no channel: what follows from it is not computed."""
    if last and LAST < x.shape[0]:
        return tl.where(tl.arange(0, x.shape[0])[:, None] < LAST, x, other)
    else:
        return x


@triton.jit
def _row(
    exit, step, tile, counted, room, K: tl.constexpr, LAST: tl.constexpr, ORDER: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, EVERY: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The logits of an exit less their maximum, a tuple of tiles [BC, BP], and the maximum [BP].

    Where there is no channel they are the lowest number, of which exp is 0 and 0 times which is 0.
    """
    c = tl.arange(0, BC)[:, None]
    z = ()
    for k in tl.static_range(K):
        if ORDER == ROWS:  # read side by side, then exchanged in shared memory: a thread a pixel
            at = tl.arange(0, BP * BC)
            side_by_side = widened(tl.load(exit + at, mask=(at < room) & (at < BP * LAST)), A)
            pixel_by_pixel = tl.arange(0, BC)[:, None] + tl.arange(0, BP)[None, :] * LAST
            z_k = tl.gather(side_by_side, tl.reshape(pixel_by_pixel, [BC * BP]), 0)
            z_k = tl.reshape(z_k, [BC, BP])
            if not EVERY:
                z_k = tl.where(counted[None, :], z_k, 0.0)
        else:
            read = counted[None, :] if k < K - 1 or LAST == BC else counted[None, :] & (c < LAST)
            if EVERY:  # what is outside of the image is neither counted nor written
                z_k = widened(tl.load(exit + k * BC * step + tile, mask=read), A)
            else:
                z_k = widened(tl.load(exit + k * BC * step + tile, mask=read, other=0.0), A)
        z += (z_k,)
    return _less_maximum(z, LAST)


@triton.jit
def _less_maximum(row, LAST: tl.constexpr):
    """The tiles of a row less their maximum, and the maximum."""
    K: tl.constexpr = len(row)
    z, y = (), ()
    for k in tl.static_range(K):
        z += (_channels_of(row[k], LOWEST, k == K - 1, LAST),)
    m = z[0]
    for k in tl.static_range(1, K):
        m = tl.maximum(m, z[k])
    m = tl.maximum(tl.max(m, 0), LOWEST)
    for k in tl.static_range(K):
        y += (_channels_of(z[k] - m[None, :], LOWEST, k == K - 1, LAST),)
    return y, m


@triton.jit
def _put(
    values, to, step, tile, inside, room, k, K: tl.constexpr, LAST: tl.constexpr, ORDER: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes the k-th tile of a row."""
    if ORDER == ROWS:
        values = _channels_of(values, 0.0, True, LAST)
        at = tl.arange(0, BP * BC)
        side_by_side = at % LAST * BP + at // LAST
        values = tl.gather(tl.reshape(values, [BC * BP]), side_by_side, 0)
        tl.store(to + at, values.to(to.dtype.element_ty), mask=(at < room) & (at < BP * LAST))
    else:
        written = inside[None, :] if k < K - 1 or LAST == BC else inside[None, :] & (tl.arange(0, BC) < LAST)[:, None]
        tl.store(to + k * BC * step + tile, values.to(to.dtype.element_ty), mask=written)


@triton.jit
def _exp2(row, rate, LAST: tl.constexpr):
    """2^(y rate) for all tiles of a row, and its sum over the channels."""
    values = ()
    for k in tl.static_range(len(row)):
        values += (_channels_of(tl.exp2(row[k] * rate), -0.0, k == len(row) - 1, LAST),)  # -0 adds nothing at all
    total = values[0]
    for k in tl.static_range(1, len(row)):
        total += values[k]
    return values, tl.sum(total, 0)


@triton.jit
def _apart(x, n: tl.constexpr):
    """The columns of x [BP, n], in some order."""
    if n == 1:
        return (tl.reshape(x, x.shape[:1]),)
    else:
        left, right = tl.split(tl.reshape(x, [x.shape[0], n // 2, 2]))
        return _apart(left, n // 2) + _apart(right, n // 2)


@triton.jit
def _dot(q, y, GUARDED: tl.constexpr, ALONE: tl.constexpr = False):
    """sum_c q_c y_c; guarded: 0 (-inf) = 0, as 0 log 0 = 0. Alone: a thread has all of a pixel, in a single tile.

    It then adds up one after the other, by fused operations; a sum over a tile is a tree, which has additions besides.
    """
    if ALONE:
        BC: tl.constexpr = q[0].shape[0]
        q_c, y_c = _apart(tl.trans(q[0]), BC), _apart(tl.trans(y[0]), BC)
        total = q_c[0] * y_c[0]
        for c in tl.static_range(1, BC):
            total += q_c[c] * y_c[c]
        return total
    total = _product(q[0], y[0]) if GUARDED else q[0] * y[0]
    for k in tl.static_range(1, len(q)):
        total += _product(q[k], y[k]) if GUARDED else q[k] * y[k]
    return tl.sum(total, 0)


@triton.jit
def _guarded_dot(
    teacher, teacher_step, teacher_tile, P, exit, step, tile, m, counted, rate, C, BC: tl.constexpr, A: tl.constexpr
):
    """sum_c q_c y_c with 0 (-inf) = 0, as 0 log 0 = 0, from memory: q = u P / sum_c u_c."""
    peak = tl.full(tile.shape, LOWEST, A)
    for c in range(0, C, BC):
        read = counted[None, :] & (c + tl.arange(0, BC) < C)[:, None]
        peak = tl.maximum(peak, tl.load(teacher + c * teacher_step + teacher_tile, mask=read, other=LOWEST).to(A))
    top = tl.max(peak, 0)
    total, dot = tl.zeros(tile.shape, A), tl.zeros(tile.shape, A)
    for c in range(0, C, BC):
        read = counted[None, :] & (c + tl.arange(0, BC) < C)[:, None]
        t = tl.load(teacher + c * teacher_step + teacher_tile, mask=read, other=float("-inf")).to(A)
        y = tl.load(exit + c * step + tile, mask=read, other=0.0).to(A) - m[None, :]
        u = tl.exp2((t - top[None, :]) * rate)
        total += u
        dot += _product(u, y)
    return tl.sum(dot, 0) * (P / tl.sum(total, 0))


@triton.jit
def _argmax(row, C, BC: tl.constexpr):
    """The first of the largest channels; NaN is the largest, as in torch.argmax."""
    arg = tl.full(row[0].shape, C, tl.int32)
    best = tl.full(row[0].shape, float("-inf"), row[0].dtype)
    for k in tl.static_range(len(row)):
        c = k * BC + tl.arange(0, BC)[:, None]
        key = tl.where(row[k] != row[k], float("inf"), row[k])
        better = (c < C) & ((key > best) | (arg == C))
        arg = tl.where(better, c, arg)
        best = tl.where(better, key, best)
    return tl.min(tl.where(best == tl.max(best, 0)[None, :], arg, C), 0)


@triton.jit(do_not_specialize=SIZES)
def exit_rows_kernel(
    exits,  # N tensors (B, C, H, W)
    grads,  # N tensors, or () where no gradient is wanted; those not in WANTED stand for none
    strides,  # (b, c, h, w), coded, of all exits and gradients, or of each of these 2 N
    labels,  # [B, H, W] or None
    class_weight,  # [C] of A or None
    pixel_weight,  # [B, H, W] of A or None
    gains,  # [T + 1, N] of A, see norms_kernel; [T + 1, N, B, H, W] without partials; None without gradients
    losses,  # [T + 1, N, B, H, W] of A, without partials
    partials,  # [T + 1, N, programs] of A, or None
    resized,  # (sizes, places, weights, copies), see resize.py, or None where all exits have the output's size
    C: tl.int32,
    H: tl.int32,
    W: tl.int64,
    tiles: tl.int32,  # of an image
    pixels: tl.int64,  # of the batch
    programs: tl.int64,
    ignore_index: tl.int64,
    temperature: tl.float64,
    label_smoothing: tl.float64,
    TEACHERS: tl.constexpr,  # row - 1 -> exit
    TARGET: tl.constexpr,
    UNIT: tl.constexpr,  # temperature 1: u = e
    SMOOTH: tl.constexpr,  # label_smoothing is not 0
    MASK_SOFT: tl.constexpr,
    WANTED: tl.constexpr,  # bits: exits that get a gradient
    ORDER: tl.constexpr,
    ROWWISE: tl.constexpr,  # rows of an image are apart
    WIDE: tl.constexpr,  # offsets in a tile need 64 bits
    K: tl.constexpr,  # tiles of a row
    LAST: tl.constexpr,  # channels of the last of them
    VEC: tl.constexpr,  # so many neighbours can be accessed at once
    BC: tl.constexpr,
    BP: tl.constexpr,
    FULL: tl.constexpr = 0,  # where exits are resized, bits: those that are not
    SAME: tl.constexpr = -1,  # one of those that are, if all are of one size; else -1
    X: tl.constexpr = 0,  # columns of a tile, or 0 where no exit is resized
    L: tl.constexpr = 0,  # a tile lies on at most so many rows and columns of them, of which it sums up gradients
    PATCH: tl.constexpr = 0,  # the same, where it reads
):
    A: tl.constexpr = losses.dtype.element_ty
    N: tl.constexpr = len(exits)
    T: tl.constexpr = len(TEACHERS)
    SOFT: tl.constexpr = T > 0 and TARGET != ARGMAX
    TWO: tl.constexpr = SOFT and TARGET == RENORMALIZED  # students' soft losses have a softmax of their own
    ONE: tl.constexpr = labels is not None or not TWO
    GRADIENT: tl.constexpr = WANTED != 0
    EXACT: tl.constexpr = exits[0].dtype.element_ty != tl.bfloat16  # in which products rounded to 11 bits are
    # A pixel that counts for the labels counts for soft losses, if there are any. What does not count is not read.
    EVERY: tl.constexpr = T > 0 and pixel_weight is None and not MASK_SOFT
    SPARE: tl.constexpr = X > 0 and K == 1 and LAST < BC and labels is not None  # a channel that the label's can be
    ALONE: tl.constexpr = K == 1 and BC > 1 and (ORDER == ROWS or X > 0)
    tau = tl.full([], temperature, A)
    smoothing = tl.full([], label_smoothing, A)
    one_rate = tl.full([], LOG2E, A)  # exp(y) = exp2(y one_rate), never exp2(z one_rate - m one_rate)
    rate = one_rate if UNIT else one_rate / tau

    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * BP
    left, j = H * W - start, b * H * W + start
    room = left * LAST
    if X:
        y0, x0, inside, place = resize.tile_of(program % tiles, H, W, X, BP)
        j = b * H * W + place
    else:
        if ORDER == PIXELS:
            left, j = tl.multiple_of(left, VEC), tl.multiple_of(j, VEC)
        elif ORDER == ROWS:
            room = tl.multiple_of(room, VEC)
        inside = tl.arange(0, BP) < left
        j += tl.arange(0, BP)
    label_weight, soft_weight, label = _pixel_weights(labels, pixel_weight, j, inside, C, ignore_index, MASK_SOFT, A)
    counted = inside if EVERY else (soft_weight if T > 0 else label_weight) != 0

    if SAME >= 0:
        on = resize.taps(resized, SAME, y0, x0, H, W, X, PATCH, BP)
        reduce = resize.matrices(resized, SAME, y0, x0, H, W, X, L, BP)

    # Phase 1: the teachers. Their target rows stay, or their argmax.
    q, arg, P = (), (), ()
    for r in tl.static_range(T):
        if X:
            if SAME < 0:
                on = resize.taps(resized, TEACHERS[r], y0, x0, H, W, X, PATCH, BP)
            z = resize.row(
                exits, strides, resized, on, TEACHERS[r], b, y0, x0, C, counted, None, FULL, SAME, X, PATCH, K, BC, BP,
                WIDE, EVERY, A,
            )  # fmt: skip
            y, m = _less_maximum(z, LAST)
        else:
            first, step, place, tile = _tile(strides, TEACHERS[r], b, start, W, ORDER, ROWWISE, WIDE, VEC, BC, BP)
            y, m = _row(exits[TEACHERS[r]] + first, step, tile, counted, room, K, LAST, ORDER, BP, BC, EVERY, A)
        if TARGET == ARGMAX:
            arg += (_argmax(y, C, BC),)
        else:
            u, Z2 = _exp2(y, rate, LAST)
            if TARGET == RENORMALIZED or UNIT:
                factor = 1.0 / Z2
                P += (tl.full([BP], 1.0, A),)
            else:  # exponents are divided, not powers of a rounded softmax: it neither underflows nor rounds first
                e, Z1 = _exp2(y, one_rate, LAST)
                factor = tl.exp2(-tl.log2(Z1) / tau)
                P += (Z2 * factor,)
            for k in tl.static_range(K):
                q += (_channels_of(u[k] * factor[None, :], 0.0, k == K - 1, LAST),)

    hot = tl.full([BP], 1.0, A) - smoothing
    if class_weight is not None:
        hot *= tl.load(class_weight + label, mask=label_weight != 0, other=0.0)
    smooth = smoothing / C
    class_weights = tl.full([], 0, A)
    if SMOOTH:
        for k in tl.static_range(K):
            class_weights += tl.sum(_class_weight(class_weight, k * BC + tl.arange(0, BC), C, A), 0)

    # Phase 2: every exit learns, from the labels and from the teachers that it is not.
    for i in range(N):
        if X:
            if SAME < 0:
                on = resize.taps(resized, i, y0, x0, H, W, X, PATCH, BP)
            z = resize.row(
                exits, strides, resized, on, i, b, y0, x0, C, counted, label if SPARE else None, FULL, SAME, X, PATCH,
                K, BC, BP, WIDE, EVERY, A,
            )  # fmt: skip
            y, m = _less_maximum(z, LAST)
        else:
            first, step, place, tile = _tile(strides, i, b, start, W, ORDER, ROWWISE, WIDE, VEC, BC, BP)
            exit = picked(exits, i) + first
            y, m = _row(exit, step, tile, counted, room, K, LAST, ORDER, BP, BC, EVERY, A)
        if SOFT:
            dots, nan = (), tl.full([BP], 0, tl.int32)
            for r in tl.static_range(T):
                dots += (_dot(q[r * K : r * K + K], y, False, ALONE),)
                nan |= (dots[r] != dots[r]).to(tl.int32)
            if tl.max(nan, 0) != 0:  # rare: a test of every number would cost more
                guarded = ()
                for r in tl.static_range(T):
                    if X:
                        guarded += (_dot(q[r * K : r * K + K], y, True),)
                    elif ORDER == ROWS:
                        y_again, m_again = _row(exit, step, tile, counted, room, K, LAST, ORDER, BP, BC, EVERY, A)
                        guarded += (_dot(q[r * K : r * K + K], y_again, True),)
                    else:
                        t_first, t_step, t_place, t_tile = _tile(
                            strides, TEACHERS[r], b, start, W, ORDER, ROWWISE, WIDE, VEC, BC, BP
                        )
                        guarded += (
                            _guarded_dot(
                                exits[TEACHERS[r]] + t_first, t_step, t_tile, P[r], exit, step, tile, m, counted, rate,
                                C, BC, A,
                            ),
                        )  # fmt: skip
                dots = guarded
        e, Z1, v, Z2 = y, tl.full([BP], 1.0, A), y, tl.full([BP], 1.0, A)
        if ONE:
            e, Z1 = _exp2(y, one_rate, LAST)
        if TWO:
            v, Z2 = _exp2(y, rate, LAST)
        log_1 = tl.log(Z1)
        log_z = tl.log(Z2) * tau if TWO else log_1

        # Losses, and what multiplies the gradients' parts: sums of the targets of either softmax; label, class weights
        # and teachers' rows.
        q1, q2 = tl.full([BP], 0, A), tl.full([BP], 0, A)
        hots, smooths, taught = q1, q1, ()
        if labels is not None:
            if SPARE:
                y_label = tl.sum(tl.where(tl.arange(0, BC)[:, None] == BC - 1, z[0], -0.0), 0) - m
            elif X:
                y_label = resize.logit(exits, strides, resized, i, b, y0, x0, H, W, label, counted, FULL, X, BP, A) - m
            else:
                y_label = tl.load(exit + place + label * step, mask=counted, other=0.0).to(A) - m
            loss = hot * (log_1 - y_label)
            if SMOOTH:
                smooth_dot = tl.full([BP], 0, A)
                for k in tl.static_range(K):
                    w = _class_weight(class_weight, k * BC + tl.arange(0, BC), C, A)
                    smooth_dot += tl.sum(_product(w[:, None], y[k]), 0)
                loss += smooth * (class_weights * log_1 - smooth_dot)
            g = _enter(loss, label_weight, i, gains, losses, partials, j, inside, pixels, programs, program, GRADIENT)
            hots = _product(g, hot)
            smooths = g * smooth
            q1 += _product(g, hot + smooth * class_weights)
        else:
            _enter_nothing(i, losses, partials, j, inside, pixels, programs, program, A)
        for r in tl.static_range(T):
            if SOFT:
                loss = tau * (P[r] * log_z - dots[r])
            else:
                if X:
                    y_teacher = (
                        resize.logit(exits, strides, resized, i, b, y0, x0, H, W, arg[r], counted, FULL, X, BP, A) - m
                    )
                else:
                    y_teacher = tl.load(exit + place + arg[r] * step, mask=counted, other=0.0).to(A) - m
                loss = log_1 - y_teacher
            weight = tl.where(i == TEACHERS[r], 0.0, soft_weight)  # nobody teaches itself
            g = _enter(
                loss, weight, (r + 1) * N + i, gains, losses, partials, j, inside, pixels, programs, program, GRADIENT
            )
            if TARGET == ARGMAX:
                taught += (g,)
                q1 += g
            else:
                taught += (g * tau,)
                if TWO:
                    q2 += g * tau * P[r]
                else:
                    q1 += g * tau * P[r]

        # The gradient, (1) of the derivations: e q1 / Z1 + v q2 / Z2 less the targets.
        if GRADIENT:
            if (WANTED >> i) & 1 != 0:
                f1, f2 = q1 / Z1, q2 / Z2
                if X == 0:
                    grad_first, grad_step, grad_place, grad_tile = _tile(
                        strides, i if len(strides) == 1 else N + i, b, start, W, ORDER, ROWWISE, WIDE, VEC, BC, BP
                    )
                    to = picked(grads, i) + grad_first
                elif SAME < 0:
                    reduce = resize.matrices(resized, i, y0, x0, H, W, X, L, BP)
                for k in tl.static_range(K):
                    c = k * BC + tl.arange(0, BC)[:, None]
                    grad = tl.zeros([BC, BP], A)
                    if labels is not None:
                        grad = tl.where(c == label[None, :], -hots[None, :], 0.0)
                        if SMOOTH:
                            w = _class_weight(class_weight, k * BC + tl.arange(0, BC), C, A)
                            grad -= _product(smooths[None, :], w[:, None])
                    for r in tl.static_range(T):
                        if SOFT:
                            grad -= q[r * K + k] * taught[r][None, :]
                        else:
                            grad -= tl.where(c == arg[r][None, :], taught[r][None, :], 0.0)
                    if ONE:
                        grad += e[k] * f1[None, :]
                    if TWO:
                        grad += v[k] * f2[None, :]
                    if X:
                        grad = _channels_of(grad, 0.0, k == K - 1, LAST)
                        resize.put(
                            grad, picked(grads, i), strides, resized, reduce, i, b, y0, x0, H, W, k * BC, C, inside,
                            FULL, -1, X, L, BC, BP, WIDE, EXACT,
                        )  # fmt: skip
                    else:
                        _put(grad, to, grad_step, grad_tile, inside, room, k, K, LAST, ORDER, BP, BC)


@triton.jit
def _block(
    exits, strides, resized, on, i, b, y0, x0, H, W, first, step, tile, c0, C, counted, FULL: tl.constexpr,
    SAME: tl.constexpr, X: tl.constexpr, PATCH: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    LARGER: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Logits of exit i of channels from c0 on, [BC, BP]; -inf where there is none or the pixel does not count."""
    read = (c0 + tl.arange(0, BC) < C)[:, None] & counted[None, :]
    if X:
        if SAME < 0:
            taps = resize.taps(resized, i, y0, x0, H, W, X, PATCH, BP, LARGER)
        else:
            taps = on
        z = resize.logits(
            exits, strides, resized, taps, i, b, y0, x0, c0, C, counted, None, FULL, SAME, X, PATCH, BC, BP, WIDE,
            True, A, LARGER,
        )  # fmt: skip
        return tl.where(read, z, float("-inf"))
    else:
        S: tl.constexpr = len(strides)
        at = exits[i] + (first[i % S] + c0 * step[i % S]) + tile[i % S]
        return widened(tl.load(at, mask=read, other=float("-inf")), A)


@triton.jit(do_not_specialize=SIZES)
def exit_blocks_kernel(
    exits,  # N tensors (B, C, H, W)
    grads,  # N tensors, or None where no gradient is wanted
    strides,  # (b, c, h, w), coded, of all exits and gradients, or of each of these 2 N
    labels,  # [B, H, W] or None
    class_weight,  # [C] of A or None
    pixel_weight,  # [B, H, W] of A or None
    gains,  # [T + 1, N] of A, see norms_kernel; [T + 1, N, B, H, W] without partials; None without gradients
    losses,  # [T + 1, N, B, H, W] of A, without partials
    partials,  # [T + 1, N, programs] of A, or None
    resized,  # (sizes, places, weights, copies), see resize.py, or None where all exits have the output's size
    C: tl.int32,
    H: tl.int32,
    W: tl.int64,
    tiles: tl.int32,  # of an image
    pixels: tl.int64,  # of the batch
    programs: tl.int64,
    ignore_index: tl.int64,
    temperature: tl.float64,
    label_smoothing: tl.float64,
    TEACHERS: tl.constexpr,  # row - 1 -> exit
    ROWS: tl.constexpr,  # exit -> row - 1, or -1 where it does not teach
    TARGET: tl.constexpr,
    UNIT: tl.constexpr,  # temperature 1: u = e
    SMOOTH: tl.constexpr,  # label_smoothing is not 0
    MASK_SOFT: tl.constexpr,
    LEARN: tl.constexpr,  # teachers get a gradient for being taught from
    GRADIENT: tl.constexpr,
    ORDER: tl.constexpr,
    ROWWISE: tl.constexpr,  # rows of an image are apart
    WIDE: tl.constexpr,  # offsets in a tile need 64 bits
    BC: tl.constexpr,
    BP: tl.constexpr,
    FULL: tl.constexpr = 0,  # as for exit_rows_kernel
    SAME: tl.constexpr = -1,
    X: tl.constexpr = 0,
    L: tl.constexpr = 0,
    PATCH: tl.constexpr = 0,
    TALL: tl.constexpr = 0,  # bits: exits with more rows than the output
    BROAD: tl.constexpr = 0,  # and with more columns
):
    A: tl.constexpr = losses.dtype.element_ty
    N: tl.constexpr = len(exits)
    T: tl.constexpr = len(TEACHERS)
    S: tl.constexpr = len(strides)
    EXACT: tl.constexpr = exits[0].dtype.element_ty != tl.bfloat16
    SOFT: tl.constexpr = T > 0 and TARGET != ARGMAX
    TWO: tl.constexpr = SOFT and TARGET == RENORMALIZED  # students' soft losses have a softmax of their own
    ONE: tl.constexpr = labels is not None or not TWO
    tau = tl.full([], temperature, A)
    smoothing = tl.full([], label_smoothing, A)
    one_rate = tl.full([], LOG2E, A)  # exp(y) = exp2(y one_rate), never exp2(z one_rate - m one_rate)
    rate = one_rate if UNIT else one_rate / tau

    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * BP
    HALO: tl.constexpr = 1 if TALL | BROAD else 0
    if X:
        y0, x0, inside, spot = resize.tile_of(program % tiles, H, W, X, BP, HALO)
        j = b * H * W + spot
    else:
        y0, x0 = 0, 0
        inside = tl.arange(0, BP) < H * W - start
        j = b * H * W + start + tl.arange(0, BP)
    own = resize.own(y0, x0, inside, X, BP) if HALO else inside  # pixels whose losses and gradients are written here
    label_weight, soft_weight, k = _pixel_weights(labels, pixel_weight, j, inside, C, ignore_index, MASK_SOFT, A)
    # A pixel that counts for the labels counts for soft losses, if there are any. What does not count is not read.
    if T > 0 and pixel_weight is None and not MASK_SOFT:
        counted = inside
    else:
        counted = (soft_weight if T > 0 else label_weight) != 0

    # Addresses: where a tile begins in a tensor is a scalar in 64 bits; the offsets from there on, [BP] and (BC, BP),
    # are the same for all tensors of the same strides. These come as 2 stride + 3, because Triton would compile anew
    # for every 1 and every multiple of 16 in a tuple.
    first, step, place, tile = (), (), (), ()
    for s in tl.static_range(S):
        step_b, step_c, step_h, step_w = (
            (strides[s][0].to(tl.int64) >> 1) - 1,
            (strides[s][1].to(tl.int64) >> 1) - 1,
            (strides[s][2].to(tl.int64) >> 1) - 1,
            (strides[s][3].to(tl.int64) >> 1) - 1,
        )
        if ROWWISE:
            x = start + tl.arange(0, BP)
            first += (b * step_b,)
            place += (x // W * step_h + x % W * step_w,)
        elif ORDER == PIXELS:
            first += (b * step_b + start,)
            place += (tl.arange(0, BP),)
        else:
            first += (b * step_b + start * step_w,)
            place += (tl.arange(0, BP) * step_w,)
        step += (step_c,)
        if ORDER == CHANNELS:
            offsets = place[s][None, :] + tl.arange(0, BC)[:, None]
        else:
            offsets = place[s][None, :] + (tl.arange(0, BC) * step_c)[:, None]
        tile += (offsets if WIDE else offsets.to(tl.int32),)
    on, reduce = (), ()
    if SAME >= 0:  # else registers for those of every exit are scarcer than instructions
        on = resize.taps(resized, SAME, y0, x0, H, W, X, PATCH, BP, TALL | BROAD)
        reduce = resize.matrices(resized, SAME, y0, x0, H, W, X, L, BP, TALL, BROAD, HALO)

    # Phase 1: over blocks of channels, the running maximum m of every exit, Z1 = sum e, Z2 = sum u, and the dot
    # products sum_c u_c y_c of teachers and students. Where a maximum grows by -up, what was summed up follows.
    m, Z1, Z2, arg, best, smooth_dot, dot = (), (), (), (), (), (), ()
    for _ in tl.static_range(N):
        m += (tl.full([BP], LOWEST, A),)
        Z1 += (tl.full([BP], 0, A),)
        Z2 += (tl.full([BP], 0, A),)
        arg += (tl.full([BP], 0, tl.int32),)
        best += (tl.full([BP], float("-inf"), A),)
        smooth_dot += (tl.full([BP], 0, A),)
    for _ in tl.static_range(T * N):
        dot += (tl.full([BP], 0, A),)
    class_weights = tl.full([], 0, A)

    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        y, u, up, fade, kept = (), (), (), (), ()
        new_m, new_Z1, new_Z2, new_arg, new_best, new_smooth_dot, new_dot = (), (), (), (), (), (), ()
        for i in tl.static_range(N):
            z = _block(
                exits, strides, resized, on, i, b, y0, x0, H, W, first, step, tile, c0, C, counted, FULL, SAME, X,
                PATCH, BC, BP, WIDE, TALL | BROAD, A,
            )  # fmt: skip
            new_m += (tl.maximum(m[i], tl.max(z, 0)),)
            y += (z - new_m[i][None, :],)
            up += (m[i] - new_m[i],)
            if ONE:
                new_Z1 += (Z1[i] * tl.exp2(up[i] * one_rate) + tl.sum(tl.exp2(y[i] * one_rate), 0),)
            else:
                new_Z1 += (Z1[i],)
            if SOFT and (TWO or ROWS[i] >= 0):
                u += (tl.exp2(y[i] * rate),)
                fade += (tl.exp2(up[i] * rate),)
                kept += (Z2[i] * fade[i],)
                new_Z2 += (kept[i] + tl.sum(u[i], 0),)
            else:
                u += (0,)
                fade += (0,)
                kept += (0,)
                new_Z2 += (Z2[i],)
            if TARGET == ARGMAX and ROWS[i] >= 0:  # first of the largest, and NaN is the largest, as in torch.argmax
                key = tl.where(z != z, float("inf"), tl.minimum(z, -LOWEST))
                top = tl.max(key, 0)
                better = top > best[i]
                new_arg += (tl.where(better, tl.min(tl.where(key == top[None, :], c[:, None], C), 0), arg[i]),)
                new_best += (tl.where(better, top, best[i]),)
            else:
                new_arg += (arg[i],)
                new_best += (best[i],)
            if SMOOTH:
                w = _class_weight(class_weight, c, C, A)
                grown = _product(class_weights, up[i]) + tl.sum(_product(w[:, None], y[i]), 0)
                new_smooth_dot += (smooth_dot[i] + grown,)
            else:
                new_smooth_dot += (smooth_dot[i],)
        for r in tl.static_range(T):
            for i in tl.static_range(N):
                if SOFT and i != TEACHERS[r]:
                    # Nothing here is positive: the minimum with 0 makes 0 of 0 (-inf), a NaN, as 0 log 0 = 0.
                    grown = tl.sum(tl.minimum(u[TEACHERS[r]] * y[i], 0.0), 0)
                    grown += tl.minimum(kept[TEACHERS[r]] * up[i], 0.0)
                    dot_r = tl.where(fade[TEACHERS[r]] == 0, 0.0, fade[TEACHERS[r]] * dot[r * N + i])
                    new_dot += (dot_r + grown,)
                else:
                    new_dot += (dot[r * N + i],)
        if SMOOTH:
            class_weights += tl.sum(_class_weight(class_weight, c, C, A), 0)
        m, Z1, Z2, arg, best, smooth_dot, dot = new_m, new_Z1, new_Z2, new_arg, new_best, new_smooth_dot, new_dot

    # Between the walks, per pixel: factors of the targets and logarithms.
    log_1, log_2, safe_1, safe_2, factor, P = (), (), (), (), (), ()
    for i in tl.static_range(N):
        safe_1 += (tl.where(counted, Z1[i], 1.0),)
        safe_2 += (tl.where(counted, Z2[i], 1.0),)
        log_1 += (tl.log(safe_1[i]),)
        log_2 += (tl.log(safe_2[i]) if TWO else log_1[i],)
        if SOFT and ROWS[i] >= 0:
            if TARGET == RENORMALIZED or UNIT:
                factor += (1.0 / safe_2[i],)
                P += (tl.full([BP], 1.0, A),)
            else:  # exponents are divided, not powers of a rounded softmax: it neither underflows nor rounds first
                factor += (tl.exp2(-tl.log2(safe_1[i]) / tau),)
                P += (Z2[i] * factor[i],)
        else:
            factor += (0,)
            P += (0,)
    hot = tl.full([BP], 1.0, A) - smoothing
    if class_weight is not None:
        hot *= tl.load(class_weight + k, mask=label_weight != 0, other=0.0)
    smooth = smoothing / C

    # Phase 2, the losses. Also what their gradients need, each with all that multiplies it: q1 and q2, the sums of the
    # targets of either softmax; hots, smooths, taught: what multiplies the label, the class weights, teachers' rows.
    nothing = tl.full([BP], 0.0, A)
    q1, q2, hots, smooths = (), (), (), ()
    g, taught, said, said_log = (), (), (), ()  # [N, T]
    for i in tl.static_range(N):
        q1_i, q2_i = nothing, nothing
        if labels is not None:
            if X:
                y_k = resize.logit(exits, strides, resized, i, b, y0, x0, H, W, k, counted, FULL, X, BP, A) - m[i]
            else:
                spot = exits[i] + first[i % S] + (place[i % S] + k * step[i % S])
                y_k = tl.load(spot, mask=counted, other=0.0).to(A) - m[i]
            loss = hot * (log_1[i] - y_k)
            if SMOOTH:
                loss += smooth * (class_weights * log_1[i] - smooth_dot[i])
            if HALO:
                loss = tl.where(own, loss, 0.0)
            g_i = _enter(loss, label_weight, i, gains, losses, partials, j, own, pixels, programs, program, GRADIENT)
            if GRADIENT:
                hots += (_product(g_i, hot),)
                smooths += (g_i * smooth,)
                q1_i += _product(g_i, hot + smooth * class_weights)
        else:
            _enter_nothing(i, losses, partials, j, own, pixels, programs, program, A)
        for r in tl.static_range(T):
            if i == TEACHERS[r]:  # nobody teaches itself
                _enter_nothing((r + 1) * N + i, losses, partials, j, own, pixels, programs, program, A)
                g += (nothing,)
                taught += (nothing,)
                said += (nothing,)
                said_log += (nothing,)
            else:
                if SOFT:
                    scale = tau if TWO else 1.0
                    d = dot[r * N + i] * factor[TEACHERS[r]]
                    log_z = log_2[i] * scale
                    loss = tau * (P[TEACHERS[r]] * log_z - d)
                else:
                    top = arg[TEACHERS[r]]
                    if X:
                        y_t = (
                            resize.logit(exits, strides, resized, i, b, y0, x0, H, W, top, counted, FULL, X, BP, A)
                            - m[i]
                        )
                    else:
                        spot = exits[i] + first[i % S] + (place[i % S] + top * step[i % S])
                        y_t = tl.load(spot, mask=counted, other=0.0).to(A) - m[i]
                    loss = log_1[i] - y_t
                if HALO:
                    loss = tl.where(own, loss, 0.0)
                g_r = _enter(
                    loss, soft_weight, (r + 1) * N + i, gains, losses, partials, j, own, pixels, programs, program,
                    GRADIENT,
                )  # fmt: skip
                if GRADIENT:
                    g += (g_r,)
                    if SOFT:
                        taught += (g_r * tau * factor[TEACHERS[r]],)
                        said += (_product(g_r, d - P[TEACHERS[r]] * log_z),)
                        said_log += (g_r * log_z,)
                        if TWO:
                            q2_i += g_r * tau * P[TEACHERS[r]]
                        else:
                            q1_i += g_r * tau * P[TEACHERS[r]]
                    else:
                        q1_i += g_r
        q1 += (q1_i,)
        q2 += (q2_i,)

    # Phase 2, the gradients: e q1 / Z1 + u q2 / Z2 less the targets, (1) of the derivations. A teacher that learns also
    # gets -q_c a_c, where a_c = sum over students of g (y_c - log Z), plus sigma_c (or q_c) times sum_c q_c a_c.
    if GRADIENT:
        f1, f2, log_said = (), (), ()
        for i in tl.static_range(N):
            q1_i, q2_i, log_i = q1[i], q2[i], nothing
            if LEARN and ROWS[i] >= 0:
                q_a = nothing
                for s in tl.static_range(N):
                    q_a += said[s * T + ROWS[i]]
                    log_i += said_log[s * T + ROWS[i]]
                if TWO:
                    q2_i += q_a
                else:
                    q1_i += q_a
            f1 += (q1_i / safe_1[i],)
            f2 += (q2_i / safe_2[i],)
            log_said += (log_i,)

        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            written = (c < C)[:, None] & inside[None, :]
            y, u = (), ()
            for i in tl.static_range(N):
                if LEARN or (SOFT and ROWS[i] >= 0):  # others need them
                    z = _block(
                        exits, strides, resized, on, i, b, y0, x0, H, W, first, step, tile, c0, C, counted, FULL, SAME,
                        X, PATCH, BC, BP, WIDE, TALL | BROAD, A,
                    )  # fmt: skip
                    y += (z - m[i][None, :],)
                    u += (tl.exp2(y[i] * rate) if SOFT and (TWO or ROWS[i] >= 0) else 0,)
                else:
                    y += (0,)
                    u += (0,)
            one_hot = (c[:, None] == k[None, :]).to(A)
            for i in tl.static_range(N):
                if grads[i] is not None:
                    grad = tl.full([BC, BP], 0, A)
                    if LEARN or (SOFT and ROWS[i] >= 0):
                        y_i, u_i = y[i], u[i]
                    else:
                        z = _block(
                            exits, strides, resized, on, i, b, y0, x0, H, W, first, step, tile, c0, C, counted, FULL,
                            SAME, X, PATCH, BC, BP, WIDE, TALL | BROAD, A,
                        )  # fmt: skip
                        y_i = z - m[i][None, :]
                        u_i = tl.exp2(y_i * rate) if TWO else 0
                    if ONE:
                        grad += tl.exp2(y_i * one_rate) * f1[i][None, :]
                    if TWO:
                        grad += u_i * f2[i][None, :]
                    for r in tl.static_range(T):
                        if i != TEACHERS[r] and SOFT:
                            grad -= u[TEACHERS[r]] * taught[i * T + r][None, :]
                        elif i != TEACHERS[r]:
                            grad -= tl.where(c[:, None] == arg[TEACHERS[r]][None, :], g[i * T + r][None, :], 0.0)
                    if labels is not None:
                        grad -= one_hot * hots[i][None, :]
                        if SMOOTH:
                            grad -= _product(smooths[i][None, :], _class_weight(class_weight, c, C, A)[:, None])
                    if LEARN and ROWS[i] >= 0:
                        a = tl.full([BC, BP], 0, A) - log_said[i][None, :]
                        for s in tl.static_range(N):
                            if s != i:
                                a += _product(g[s * T + ROWS[i]][None, :], y[s])
                        grad -= _product(u[i] * factor[i][None, :], a)
                    if X:
                        grad = tl.where(written, grad, 0.0)
                        if SAME < 0:
                            reduce_i = resize.matrices(resized, i, y0, x0, H, W, X, L, BP, TALL, BROAD, HALO)
                        else:
                            reduce_i = reduce
                        resize.put(
                            grad, grads[i], strides, resized, reduce_i, i, b, y0, x0, H, W, c0, C, own, FULL, SAME, X,
                            L, BC, BP, WIDE, EXACT, TALL, BROAD, HALO,
                        )  # fmt: skip
                    else:
                        to = grads[i] + (first[(N + i) % S] + c0 * step[(N + i) % S]) + tile[(N + i) % S]
                        tl.store(to, grad.to(grads[i].dtype.element_ty), mask=written)


# ---- phases 0 and 3, and the backward's scaling ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["C", "pixels", "programs", "ignore_index"])
def count_kernel(
    labels,  # [pixels] or None
    class_weight,  # [C] of A or None
    pixel_weight,  # [pixels] of A or None
    partials,  # [2, programs] of A: divisors of label and soft means
    C: tl.int32,
    pixels: tl.int64,
    programs: tl.int64,
    ignore_index: tl.int64,
    MASK_SOFT: tl.constexpr,
    BP: tl.constexpr,
):
    """Phase 0: sums of pixel_weight * class_weight[label] over labelled pixels, and of pixel_weight."""
    A: tl.constexpr = partials.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    j = program * BP + tl.arange(0, BP)
    label, soft, k = _pixel_weights(labels, pixel_weight, j, j < pixels, C, ignore_index, MASK_SOFT, A)
    if class_weight is not None:
        label = _product(label, tl.load(class_weight + k))
    tl.store(partials + program, tl.sum(label, 0))
    tl.store(partials + programs + program, tl.sum(soft, 0))


@triton.jit
def _sum_over_programs(partials, programs, BLOCK: tl.constexpr):
    sums = tl.full([BLOCK], 0, tl.float64)
    for start in range(0, programs, BLOCK):
        place = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + place, mask=place < programs, other=0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["programs", "divisor"])
def norms_kernel(
    counts,  # [2, programs]: parts of the divisors of label and soft means, or None: they are `divisor`
    weights,  # 2 (T + 1) N numbers, of which two add up to a weight, or none
    grad_losses,  # [T + 1, N] or None
    norms,  # [2] float64: what label and soft losses are multiplied with
    gains,  # [T + 1, N], or None: the gradient of the result with respect to the loss of a pixel of weight 1
    programs: tl.int64,
    divisor: tl.float64,
    N: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 0: norms are 1 over the divisors, 0 where these are 0; gains are weights or grad_losses times norms.

    Of an infinite divisor the norm is NaN: as 0 it would leave out what made it so.
    """
    for row in tl.static_range(2):
        if counts is None:
            total = tl.full([], divisor, tl.float64)
        else:
            total = _sum_over_programs(counts + row * programs, programs, BLOCK)
        norm = tl.where(total == 0, 0.0, tl.where(tl.abs(total) == float("inf"), float("nan"), 1.0 / total))
        tl.store(norms + row, norm)
        if gains is not None:
            for entry in tl.static_range(0 if row == 0 else N, N if row == 0 else ENTRIES):
                if grad_losses is None:
                    gain = tl.full([], weights[2 * entry], tl.float64) + tl.full([], weights[2 * entry + 1], tl.float64)
                else:
                    gain = tl.load(grad_losses + entry).to(tl.float64)
                tl.store(gains + entry, _product(gain, norm).to(gains.dtype.element_ty))


@triton.jit(do_not_specialize=["programs", "N"])
def finish_kernel(
    partials,  # [entries, programs]
    norms,  # [2] float64
    losses,  # [entries]
    programs: tl.int64,
    N: tl.int32,  # the first N entries are label losses
    BLOCK: tl.constexpr,
):
    """Phase 3: the sum of each entry over programs, times its norm."""
    entry = tl.program_id(0)
    result = _sum_over_programs(partials + entry * programs, programs, BLOCK)
    result *= tl.load(norms + (entry >= N).to(tl.int32))
    tl.store(losses + entry, result.to(losses.dtype.element_ty))


@triton.jit
def total_kernel(losses, weights, total, ENTRIES: tl.constexpr):
    """Phase 3: the sum of weights * losses; a weight of 0 leaves out even what is not finite."""
    result = tl.full([], 0, tl.float64)
    for entry in tl.static_range(ENTRIES):
        weight = tl.full([], weights[2 * entry], tl.float64) + tl.full([], weights[2 * entry + 1], tl.float64)
        result += _product(weight, tl.load(losses + entry).to(tl.float64))
    tl.store(total, result.to(total.dtype.element_ty))


@triton.jit(do_not_specialize=["n"])
def scale_kernel(x, factor, n: tl.int64, BLOCK: tl.constexpr):
    """x *= factor over memory; where factor is 1, nothing is read or written."""
    f = tl.load(factor)
    if f != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(x + i, mask=i < n).to(f.dtype) * f
        tl.store(x + i, scaled.to(x.dtype.element_ty), mask=i < n)
