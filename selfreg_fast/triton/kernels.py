"""The exit-loss matrix in Triton: one kernel for the mathematics, three small ones around it.

A program has a tile of pixels and walks over the channels in blocks of BC, twice, with the same block of all N exits
in registers at once. A tile (BC, BP) has its pixels across the threads, so that no reduction over channels crosses
lanes, and what is known of a pixel is a vector [BP]. Phases, numbered as on every backend:

    phase 0   what the means divide by                                count_kernel, finish_kernel
    phase 1   first walk: statistics of every exit, online            exit_loss_kernel
    phase 2   the losses; second walk: the gradients                  exit_loss_kernel
    phase 3   sums over programs, in a fixed order, in float64        finish_kernel, total_kernel

Since all exits are walked over together, a teacher is an exit whose statistics others use, and an exit is read once
from memory and once from cache whatever the number of teachers. Mathematics: csrc/pixel_math.h, derivations:
selfreg_fast/reference.py. Notation: m = max_c z_c, y = z - m <= 0, e = exp(y), u = exp(y / tau); a teacher's target is
q = factor u, and P = sum_c q_c. A, the type of the arithmetic, is float32, or float64 for float64 exits.
"""

import triton
import triton.language as tl

RAW = tl.constexpr(0)  # sigma(t)^(1/tau), of temperature 1 too
RENORMALIZED = tl.constexpr(1)  # softmax(t / tau)
ARGMAX = tl.constexpr(2)  # one-hot of argmax t

PIXELS = tl.constexpr(0)  # neighbouring pixels are neighbours in memory (NCHW)
CHANNELS = tl.constexpr(1)  # neighbouring channels are (channels_last)

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
    """k y with 0 (-inf) = 0, as 0 log 0 = 0."""
    return tl.where(k == 0, 0.0, k * y)


# ---- losses ----------------------------------------------------------------------------------------------------------


@triton.jit
def _enter(
    loss, weight, norm, entry, grad_losses, weights, losses, partials, j, inside, pixels, programs, program,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """Puts an entry of the matrix: the weighted loss to the map, or its sum over the tile to this program's place.

    Returns the gradient of the result with respect to the unweighted loss of every pixel, where it is asked for.
    """
    weighted = tl.where(weight == 0, 0.0, weight * loss)
    if partials is None:
        tl.store(losses + entry * pixels + j, weighted, mask=inside)
    else:
        tl.store(partials + entry * programs + program, tl.sum(weighted, 0))
    if not GRADIENT:
        return weight
    elif grad_losses is None:  # weights come as two float32 each, for float64 exits
        total = tl.full([], weights[2 * entry], weight.dtype) + tl.full([], weights[2 * entry + 1], weight.dtype)
        return weight * (total * norm)
    elif partials is None:
        given = tl.load(grad_losses + entry * pixels + j, mask=inside, other=0.0)
        return tl.where(weight == 0, 0.0, weight * given)
    else:
        return weight * (tl.load(grad_losses + entry) * norm)


@triton.jit
def _enter_nothing(entry, losses, partials, j, inside, pixels, programs, program, A: tl.constexpr):
    if partials is None:
        tl.store(losses + entry * pixels + j, tl.full(j.shape, 0.0, A), mask=inside)
    else:
        tl.store(partials + entry * programs + program, 0.0)


# ---- phases 1 and 2 --------------------------------------------------------------------------------------------------

SIZES = ["C", "H", "W", "tiles", "pixels", "programs", "ignore_index", "temperature", "label_smoothing"]


@triton.jit(do_not_specialize=SIZES)
def exit_loss_kernel(
    exits,  # N tensors (B, C, H, W)
    grads,  # N tensors, or None where no gradient is wanted
    strides,  # (b, c, h, w), coded, of all exits and gradients, or of each of these 2 N
    labels,  # [B, H, W] or None
    class_weight,  # [C] of A or None
    pixel_weight,  # [B, H, W] of A or None
    grad_losses,  # [T + 1, N], or [T + 1, N, B, H, W] without partials, or None: `weights` take its place
    weights,  # 2 (T + 1) N numbers, see _enter
    norms,  # [2] float64: what label and soft losses are multiplied with
    losses,  # [T + 1, N, B, H, W] of A, without partials
    partials,  # [T + 1, N, programs] of A, or None
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
):
    A: tl.constexpr = losses.dtype.element_ty
    N: tl.constexpr = len(exits)
    T: tl.constexpr = len(TEACHERS)
    S: tl.constexpr = len(strides)
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
    inside = tl.arange(0, BP) < H * W - start
    j = b * H * W + start + tl.arange(0, BP)
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
        read = (c < C)[:, None] & counted[None, :]
        y, u, up, fade, kept = (), (), (), (), ()
        new_m, new_Z1, new_Z2, new_arg, new_best, new_smooth_dot, new_dot = (), (), (), (), (), (), ()
        for i in tl.static_range(N):
            at = exits[i] + (first[i % S] + c0 * step[i % S]) + tile[i % S]
            z = tl.load(at, mask=read, other=float("-inf")).to(A)
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
        hot *= tl.load(class_weight + k)
    smooth = smoothing / C

    # Phase 2, the losses. Also what their gradients need, each with all that multiplies it: q1 and q2, the sums of the
    # targets of either softmax; hots, smooths, gains: what multiplies the label, the class weights, teachers' rows.
    label_norm, soft_norm = tl.load(norms).to(A), tl.load(norms + 1).to(A)
    nothing = tl.full([BP], 0.0, A)
    q1, q2, hots, smooths = (), (), (), ()
    g, gains, said, said_log = (), (), (), ()  # [N, T]
    for i in tl.static_range(N):
        q1_i, q2_i = nothing, nothing
        if labels is not None:
            spot = exits[i] + first[i % S] + (place[i % S] + k * step[i % S])
            y_k = tl.load(spot, mask=counted, other=0.0).to(A) - m[i]
            loss = hot * (log_1[i] - y_k)
            if SMOOTH:
                loss += smooth * (class_weights * log_1[i] - smooth_dot[i])
            g_i = _enter(
                loss, label_weight, label_norm, i, grad_losses, weights, losses, partials, j, inside, pixels, programs,
                program, GRADIENT,
            )  # fmt: skip
            if GRADIENT:
                hots += (g_i * hot,)
                smooths += (g_i * smooth,)
                q1_i += g_i * (hot + smooth * class_weights)
        else:
            _enter_nothing(i, losses, partials, j, inside, pixels, programs, program, A)
        for r in tl.static_range(T):
            if i == TEACHERS[r]:  # nobody teaches itself
                _enter_nothing((r + 1) * N + i, losses, partials, j, inside, pixels, programs, program, A)
                g += (nothing,)
                gains += (nothing,)
                said += (nothing,)
                said_log += (nothing,)
            else:
                if SOFT:
                    scale = tau if TWO else 1.0
                    d = dot[r * N + i] * factor[TEACHERS[r]]
                    log_z = log_2[i] * scale
                    loss = tau * (P[TEACHERS[r]] * log_z - d)
                else:
                    spot = exits[i] + first[i % S] + (place[i % S] + arg[TEACHERS[r]] * step[i % S])
                    y_t = tl.load(spot, mask=counted, other=0.0).to(A) - m[i]
                    loss = log_1[i] - y_t
                g_r = _enter(
                    loss, soft_weight, soft_norm, (r + 1) * N + i, grad_losses, weights, losses, partials, j, inside,
                    pixels, programs, program, GRADIENT,
                )  # fmt: skip
                if GRADIENT:
                    g += (g_r,)
                    if SOFT:
                        gains += (g_r * tau * factor[TEACHERS[r]],)
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
            read = (c < C)[:, None] & counted[None, :]
            written = (c < C)[:, None] & inside[None, :]
            y, u = (), ()
            for i in tl.static_range(N):
                if grads[i] is not None or LEARN or ROWS[i] >= 0:
                    at = exits[i] + (first[i % S] + c0 * step[i % S]) + tile[i % S]
                    z = tl.load(at, mask=read, other=float("-inf")).to(A)
                    y += (z - m[i][None, :],)
                    u += (tl.exp2(y[i] * rate) if SOFT and (TWO or ROWS[i] >= 0) else 0,)
                else:
                    y += (0,)
                    u += (0,)
            one_hot = (c[:, None] == k[None, :]).to(A)
            for i in tl.static_range(N):
                if grads[i] is not None:
                    grad = tl.full([BC, BP], 0, A)
                    if ONE:
                        grad += tl.exp2(y[i] * one_rate) * f1[i][None, :]
                    if TWO:
                        grad += u[i] * f2[i][None, :]
                    for r in tl.static_range(T):
                        if i != TEACHERS[r] and SOFT:
                            grad -= u[TEACHERS[r]] * gains[i * T + r][None, :]
                        elif i != TEACHERS[r]:
                            grad -= tl.where(c[:, None] == arg[TEACHERS[r]][None, :], g[i * T + r][None, :], 0.0)
                    if labels is not None:
                        grad -= one_hot * hots[i][None, :]
                        if SMOOTH:
                            grad -= _class_weight(class_weight, c, C, A)[:, None] * smooths[i][None, :]
                    if LEARN and ROWS[i] >= 0:
                        a = tl.full([BC, BP], 0, A) - log_said[i][None, :]
                        for s in tl.static_range(N):
                            if s != i:
                                a += _product(g[s * T + ROWS[i]][None, :], y[s])
                        grad -= _product(u[i] * factor[i][None, :], a)
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


@triton.jit(do_not_specialize=["programs", "N"])
def finish_kernel(
    partials,  # [entries, programs]
    norms,  # [2] float64 or None
    out,  # [entries]
    programs: tl.int64,
    N: tl.int32,  # the first N entries are label losses
    BLOCK: tl.constexpr,
):
    """The sum of each entry over programs: times its norm (phase 3), or 1 over it, 0 where it is 0 (phase 0)."""
    entry = tl.program_id(0)
    sums = tl.full([BLOCK], 0, tl.float64)
    for start in range(0, programs, BLOCK):
        place = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + entry * programs + place, mask=place < programs, other=0.0).to(tl.float64)
    result = tl.sum(sums, 0)
    if norms is None:
        result = tl.where(result == 0, 0.0, 1.0 / result)
    else:
        result *= tl.load(norms + (entry >= N).to(tl.int32))
    tl.store(out + entry, result.to(out.dtype.element_ty))


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
