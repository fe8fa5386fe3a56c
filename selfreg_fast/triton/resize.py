"""Exits smaller than the output: interpolated where they are read, and their gradients summed where they arise.

An output is cut into tiles of R x X pixels, one for each program, of all channels. Interpolation is bilinear as in
F.interpolate, but of positions in whole numbers: axes_kernel says once where every output row and column lies.

    reading     A tile of the output lies on a patch of the exit of at most L x L elements. It goes to shared memory,
                from where every pixel gathers its four.
    gradients   The tile's part in the gradient, again L x L elements a channel, is Y^T G X, where the matrices X and Y
                have the weights of the tile's columns and rows: two products on tensor cores, whose operands are split
                in two, so that of float32 no more is lost than elsewhere. It goes to a copy of this tile alone.
                collect_kernel then adds up the copies, which overlap by two rows and columns, in order.

Why so. Counted in binaries for sm_90, of five exits of 21 channels at an eighth of the size and two teachers; no GPU
has run this. Instructions are those of a pixel, channel and exit: 64 in float32 and 56 in bfloat16, at 8 warps a
multiprocessor without spills. An issue slot in every cycle would take 0.48 ms and 0.42 ms for an output of
8 x 21 x 512 x 512 on 132 multiprocessors at 1.75 GHz.
- Gathering four numbers takes 4 reads of shared memory and 4 operations, about 10 instructions with the patch. Four
  loads from global memory are as many reads, with 64-bit addresses. Interpolating rows first, at the exit's own
  columns, leaves two reads, but is done for half as many numbers as there are pixels: 13 to 15.
- Tensor cores multiply mostly zeros, but need neither a list of the pixels around an element nor the idle lanes of
  walking over it: 15 in float32, 8 in bfloat16, whose gradients need no second part. Triton's own "tf32x3" took twice
  as many: it tests for infinities.
- A gather (an element looks up its pixels) computes softmaxes four times, or keeps B x C x H x W of them.
- Copies of a tile of 16 x 16 are 4 times the gradients at an eighth of the size, or a sixteenth of the output. Walking
  down the output with one copy would halve that, and read and write it at each tile.
"""

import triton
import triton.language as tl


@triton.jit
def picked(things, i):
    """things[i] for an i of run time."""
    found = things[0]
    for k in tl.static_range(1, len(things)):
        found = tl.where(i == k, things[k], found)
    return found


@triton.jit
def row_of(table, i):
    """Row i of a table of whole numbers, which are coded as the launcher says, in 64 bits."""
    row = ()
    for k in tl.static_range(len(table[0])):
        number = table[0][k].to(tl.int64)
        for r in tl.static_range(1, len(table)):
            number = tl.where(i == r, table[r][k].to(tl.int64), number)
        row += ((number >> 1) - 1,)
    return row


# ---- where things lie ------------------------------------------------------------------------------------------------

LOW = tl.constexpr(0)  # what `places` tells: the position of the exit that an output's row or column lies on or after,
FIRST = tl.constexpr(1)  # and of the exit's rows and columns the first and the last tile that have part in them
LAST = tl.constexpr(2)


@triton.jit(do_not_specialize=["H", "W", "align_corners"])
def axes_kernel(
    sizes,  # N of (h, w, rows of a copy, columns of a copy, where its copies begin), coded
    places,  # [3, N, H + W] int32
    weights,  # [N, H + W] of A: of the position after `low`
    H: tl.int32,
    W: tl.int32,
    align_corners: tl.int32,
    R: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the output's rows and columns lie on every exit, in whole numbers. See Axis in csrc/cuda/resize.h."""
    A: tl.constexpr = weights.dtype.element_ty
    i, rows = tl.program_id(1), tl.program_id(2) == 0
    h, w, _, _, _ = row_of(sizes, i)
    size = tl.where(rows, h, w)
    to = tl.where(rows, H, W).to(tl.int64)
    tile = tl.where(rows, R, X)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    N: tl.constexpr = len(sizes)
    put = i * (H + W).to(tl.int64) + tl.where(rows, 0, H) + o
    table = N * (H + W).to(tl.int64)

    aligned = align_corners != 0
    numerator = tl.where(aligned, o * (size - 1), tl.maximum((2 * o + 1) * size - to, 0))
    denominator = tl.where(aligned, tl.maximum(to - 1, 1), 2 * to)
    low = tl.maximum(tl.minimum(numerator // denominator, size - 2), 0)
    weight = tl.minimum((numerator - low * denominator).to(A) / denominator.to(A), 1.0)
    weight = tl.where(size == 1, 0.0, weight)
    tl.store(places + LOW * table + put, low.to(tl.int32), mask=o < to)
    tl.store(weights + put, weight, mask=o < to)

    # Position o of the exit is in tiles that have an output position whose low is o - 1 or o.
    begin, end = _first(o - 1, size, to, aligned), _first(o + 1, size, to, aligned)
    tl.store(places + FIRST * table + put, (begin // tile).to(tl.int32), mask=o < size)
    tl.store(places + LAST * table + put, ((end - 1) // tile).to(tl.int32), mask=o < size)


@triton.jit
def _first(low, size, to, aligned):
    """The first position of the output that lies on or after `low`; `to` where there is none."""
    numerator = tl.where(aligned, low * (to - 1), (2 * low + 1) * to - size)
    denominator = tl.where(aligned, tl.maximum(size - 1, 1), 2 * size)
    position = tl.minimum((numerator + denominator - 1) // denominator, to)
    return tl.where(low <= 0, 0, tl.where(low >= size - 1, to, position))


@triton.jit
def _pair(low, weight):
    """The two positions between which one lies, and the weight of the second.

    Both are the same one where a weight is 1: what the other holds, be it NaN, has no part.
    """
    first = tl.where(weight == 1, low + 1, low)
    second = tl.where(weight == 0, low, low + 1)
    return first, second, tl.where(first == second, 0.5, weight)


@triton.jit
def _corners(places, weights, y0, x0, H, W, X: tl.constexpr, BP: tl.constexpr):
    """Rows and columns of the four elements around each pixel of a tile, and their weights, [BP] each."""
    p = tl.arange(0, BP)
    y, x = tl.minimum(y0 + p // X, H - 1), H + tl.minimum(x0 + p % X, W - 1)
    top, bottom, down = _pair(tl.load(places + y), tl.load(weights + y))
    left, right, across = _pair(tl.load(places + x), tl.load(weights + x))
    up, back = 1.0 - down, 1.0 - across
    return top, bottom, left, right, (up * back, up * across, down * back, down * across)


@triton.jit
def _places_and_weights(resized, i, H, W):
    sizes, places, weights, copies = resized
    return places + i * (H + W).to(tl.int64), weights + i * (H + W).to(tl.int64)


# ---- reading ---------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(number, H, W, X: tl.constexpr, BP: tl.constexpr):
    """First row and column of a tile of an image, which of its pixels there are, and where they are in the image."""
    p = tl.arange(0, BP)
    across = tl.cdiv(W.to(tl.int32), X)
    y0, x0 = number // across * (BP // X), number % across * X
    y, x = y0 + p // X, x0 + p % X
    return y0, x0, (y < H) & (x < W), y.to(tl.int64) * W + x


@triton.jit
def taps(resized, i, y0, x0, H, W, X: tl.constexpr, L: tl.constexpr, BP: tl.constexpr):
    """A tile's patch of exit i: its first row and column, and in it every pixel's four elements and their weights."""
    places, weights = _places_and_weights(resized, i, H, W)
    top, bottom, left, right, weight = _corners(places, weights, y0, x0, H, W, X, BP)
    row, column = tl.load(places + y0), tl.load(places + H + x0)
    top, bottom, left, right = (top - row) * L, (bottom - row) * L, left - column, right - column
    corners = tl.join(tl.join(top + left, top + right), tl.join(bottom + left, bottom + right))
    weight = (weight[0][None, :], weight[1][None, :], weight[2][None, :], weight[3][None, :])
    return row, column, corners[None, :, :, :], weight


@triton.jit
def logits(
    exits, strides, resized, on, i, b, y0, x0, c0, C, counted, FULL: tl.constexpr, SAME: tl.constexpr, X: tl.constexpr,
    L: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, EVERY: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Logits [BC, BP] of exit i, whose taps are `on`, of channels from c0 on; 0 at pixels that do not count."""
    sizes, places, weights, copies = resized
    step_b, step_c, step_h, step_w = row_of(strides, i)
    exit = picked(exits, i) + b * step_b + c0 * step_c
    c = tl.arange(0, BC)
    if FULL != 0 and (FULL >> i) & 1 != 0:
        at = (c * step_c)[:, None] + _in_image(step_h, step_w, y0, x0, X, BP)[None, :]
        z = tl.load(exit + at, mask=(c0 + c < C)[:, None] & counted[None, :], other=0.0).to(A)
    else:
        row, column, corners, weight = on
        k = tl.arange(0, L * L)
        y, x = row + k // L, column + k % L
        h, w, _, _, _ = row_of(sizes, SAME if SAME >= 0 else i)
        there = (y < h) & (x < w)
        place = (c * step_c)[:, None] + (y * step_h + x * step_w)[None, :]
        if not WIDE:
            place = place.to(tl.int32)
        patch = tl.load(exit + place, mask=(c0 + c < C)[:, None] & there[None, :], other=0.0).to(A)
        index = (c * (L * L))[:, None, None, None] + corners
        four = tl.gather(tl.reshape(patch, [BC * L * L]), tl.reshape(index, [BC * BP * 4]), 0)
        top, bottom = tl.split(tl.reshape(four, [BC, BP, 2, 2]))
        top_left, top_right = tl.split(top)
        bottom_left, bottom_right = tl.split(bottom)
        z = _mixed(weight, top_left, top_right, bottom_left, bottom_right)
        if not EVERY:
            z = tl.where(counted[None, :], z, 0.0)
    return z


@triton.jit
def logit(
    exits, strides, resized, i, b, y0, x0, H, W, channel, counted, FULL: tl.constexpr, X: tl.constexpr,
    BP: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The logit of exit i of one channel for each pixel, [BP]; 0 at pixels that do not count."""
    step_b, step_c, step_h, step_w = row_of(strides, i)
    exit = picked(exits, i) + b * step_b + channel * step_c
    if FULL != 0 and (FULL >> i) & 1 != 0:
        z = tl.load(exit + _in_image(step_h, step_w, y0, x0, X, BP), mask=counted, other=0.0).to(A)
    else:
        places, weights = _places_and_weights(resized, i, H, W)
        top, bottom, left, right, weight = _corners(places, weights, y0, x0, H, W, X, BP)
        above, below, left, right = exit + top * step_h, exit + bottom * step_h, left * step_w, right * step_w
        top_left = tl.load(above + left, mask=counted, other=0.0).to(A)
        top_right = tl.load(above + right, mask=counted, other=0.0).to(A)
        bottom_left = tl.load(below + left, mask=counted, other=0.0).to(A)
        bottom_right = tl.load(below + right, mask=counted, other=0.0).to(A)
        z = _mixed(weight, top_left, top_right, bottom_left, bottom_right)
    return z


@triton.jit
def _mixed(weight, top_left, top_right, bottom_left, bottom_right):
    """In one order wherever a logit is computed, for of a single class the loss is exactly 0."""
    return weight[0] * top_left + weight[1] * top_right + weight[2] * bottom_left + weight[3] * bottom_right


@triton.jit
def _in_image(step_h, step_w, y0, x0, X: tl.constexpr, BP: tl.constexpr):
    p = tl.arange(0, BP)
    return (y0 + p // X) * step_h + (x0 + p % X) * step_w


# ---- gradients -------------------------------------------------------------------------------------------------------


@triton.jit
def matrices(
    resized, i, y0, x0, H, W, X: tl.constexpr, L: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """What a tile's rows [R, L] and columns [X, L] weigh in its patch of exit i."""
    places, weights = _places_and_weights(resized, i, H, W)
    return _matrix(places, weights, y0, H, BP // X, L), _matrix(places + H, weights + H, x0, W, X, L)


@triton.jit
def _matrix(places, weights, start, size, FROM: tl.constexpr, TO: tl.constexpr):
    o = tl.minimum(start + tl.arange(0, FROM), size - 1)
    low = (tl.load(places + o) - tl.load(places + start))[:, None]
    weight = tl.load(weights + o)[:, None]
    k = tl.arange(0, TO)[None, :]
    return tl.where(low == k, 1.0 - weight, tl.where(low + 1 == k, weight, 0.0))


@triton.jit
def put(
    grad, to, strides, resized, the_matrices, i, b, y0, x0, H, W, c0, C, inside, FULL: tl.constexpr,
    SAME: tl.constexpr, X: tl.constexpr, L: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Writes a tile's gradient [BC, BP] of channels from c0 on: to its place in `to`, or summed up to the tile's copy.

    It is 0 where there is no pixel.
    """
    sizes, places, weights, copies = resized
    N: tl.constexpr = len(sizes)
    R: tl.constexpr = BP // X
    if FULL != 0 and (FULL >> i) & 1 != 0:
        step_b, step_c, step_h, step_w = row_of(strides, i if len(strides) == 1 else N + i)
        to += b * step_b + c0 * step_c
        channel = tl.arange(0, BC)
        at = (channel * step_c)[:, None] + _in_image(step_h, step_w, y0, x0, X, BP)[None, :]
        tl.store(to + at, grad.to(to.dtype.element_ty), mask=(c0 + channel < C)[:, None] & inside[None, :])
    else:
        down, across = the_matrices
        summed = _product(tl.reshape(grad, [BC * R, X]), across, EXACT)
        summed = tl.reshape(tl.permute(tl.reshape(summed, [BC, R, L]), [0, 2, 1]), [BC * L, R])
        summed = _product(summed, down, EXACT)
        _, _, rows, columns, _ = row_of(sizes, SAME if SAME >= 0 else i)
        _, _, _, _, copy = row_of(sizes, i)
        pitch = tl.cdiv(W, X) * columns
        begin = ((b * tl.cdiv(H, R) + y0 // R) * C + c0) * rows * pitch + x0 // X * columns
        k = tl.arange(0, BC * L)[:, None]
        c, column, row = k // L, k % L, tl.arange(0, L)[None, :]
        place = (c * rows + row) * pitch + column
        if not WIDE:
            place = place.to(tl.int32)
        there = (c0 + c < C) & (column < columns) & (row < rows)
        tl.store(copies + copy + begin + place, summed, mask=there)


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    """The matrix product, in the arithmetic of a and b, or of factors rounded to 11 bits."""
    if a.dtype == tl.float64:
        return tl.dot(a, b, input_precision="ieee")
    elif EXACT:
        a_high, b_high = _high(a), _high(b)
        total = tl.dot(a - a_high, b_high, input_precision="tf32")
        total = tl.dot(a_high, b - b_high, total, input_precision="tf32")
        return tl.dot(a_high, b_high, total, input_precision="tf32")
    else:
        return tl.dot(a, b, input_precision="tf32")


@triton.jit
def _high(x):
    """The first 11 bits of float32, which tensor cores multiply."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["B", "C", "H", "W"])
def collect_kernel(
    copies,  # [B, tiles down, C, rows, tiles across, columns] of A of every exit
    grads,  # N tensors (B, C, h, w); those not in COLLECTED stand for none
    strides,  # (b, c, h, w) of each, coded
    sizes,
    places,
    B: tl.int32,
    C: tl.int32,
    H: tl.int32,
    W: tl.int32,
    COLLECTED: tl.constexpr,  # bits: exits that have copies
    R: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every element of a gradient: the sum over the tiles that have part in it. A program has some of one row."""
    A: tl.constexpr = copies.dtype.element_ty
    N: tl.constexpr = len(grads)
    i = tl.program_id(1)
    h, w, rows, columns, copy = row_of(sizes, i)
    w = w.to(tl.int32)
    blocks = tl.cdiv(C * w, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    if ((COLLECTED >> i) & 1 != 0) & (row < B * h):
        b, y = row // h, row % h
        e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = e < C * w
        step_b, step_c, step_h, step_w = row_of(strides, i)
        c, x = tl.where(step_c == 1, e % C, e // w), tl.where(step_c == 1, e // C, e % w)
        x = tl.where(inside, x, 0)
        table = N * (H + W).to(tl.int64)
        low = places + i * (H + W).to(tl.int64)
        first_y, last_y = tl.load(low + FIRST * table + y), tl.load(low + LAST * table + y)
        first_x, last_x = tl.load(low + FIRST * table + H + x), tl.load(low + LAST * table + H + x)
        most = tl.max(last_x - first_x, 0) + 1
        down, pitch = tl.cdiv(H, R), tl.cdiv(W, X) * columns
        total = tl.zeros([BLOCK], A)
        for tile_y in range(first_y, last_y + 1):
            row_in_copy = y - tl.load(low + tile_y * R)
            place = copies + copy + ((b * down + tile_y) * C * rows + row_in_copy) * pitch + c * (rows * pitch)
            for k in range(most):
                tile_x = first_x + k
                here = inside & (tile_x <= last_x)
                column = x - tl.load(low + H + tile_x * X, mask=here, other=0)
                total += tl.load(place + tile_x * columns + column, mask=here, other=0.0)
        to = picked(grads, i)
        place = b * step_b + c * step_c + y * step_h + x * step_w
        tl.store(to + place, total.to(to.dtype.element_ty), mask=inside)
