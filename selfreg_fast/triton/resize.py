"""Exits of other sizes than the output's: interpolated where they are read, gradients summed where they arise.

An output is cut into tiles of R x X pixels, one for each program, of all channels. Interpolation is bilinear as in
F.interpolate, but of positions in whole numbers: axes_kernel says once where every output row and column lies.

    reading     A tile of the output lies on a patch of the exit of at most L x L elements. It goes to shared memory,
                from where every pixel gathers its four.
    gradients   The tile's part in the gradient, again L x L elements a channel, is Y^T G X, where the matrices X and Y
                have the weights of the tile's columns and rows: two products on tensor cores, whose operands are split
                in two, so that of float32 no more is lost than elsewhere. It goes to a copy of this tile alone.
                collect_kernel then adds up the copies, which overlap by two rows and columns, in order.

Exits larger than the output are rare. No patch is read: a pixel loads its four elements. In the same products a tile's
patch is two rows for each of the output's, and two columns; only neighbours have one in common. So that a tile knows
all parts of the sums that it writes, tiles then overlap by one row and column, the halo, whose softmaxes are computed
twice; and a gradient is written where it belongs, without copies. An exit that is larger one way and smaller the other
has copies along the other alone.

Why so. Counted in binaries for sm_90, of five exits of 21 channels at an eighth of the size and two teachers; no GPU
has run this. Instructions are those of a pixel, channel and exit: 58 in float32 and 50 in bfloat16, at 8 warps a
multiprocessor (temperature 2; at 1, fewer registers leave room for 16). An issue slot in every cycle would take 0.43 ms
and 0.37 ms for an output of 8 x 21 x 512 x 512 on 132 multiprocessors at 1.75 GHz.
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
def widened(x, A: tl.constexpr):
    """x as an A. Of bfloat16 the bits say so: of two in a register a conversion takes three operations."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(A)
    else:
        return x.to(A)


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


@triton.jit
def tiles_along(size, tile: tl.constexpr, HALO: tl.constexpr):
    """How many tiles lie along a side of an image. Each but the first repeats the last HALO pixels of another."""
    return tl.maximum(tl.cdiv(size - HALO, tile - HALO), 1)


@triton.jit(do_not_specialize=["H", "W", "most", "align_corners"])
def axes_kernel(
    sizes,  # N of (h, w, rows of a copy, columns of a copy, where its copies begin), coded
    places,  # [N, H + W] int32: the position of the exit that an output's row or column lies on or after, `low`
    weights,  # [N, H + W] of A: of the position after `low`
    parts,  # [2, N, most] int32: of an exit's rows, then columns, the first and the last tile that have part in them
    H: tl.int32,
    W: tl.int32,
    most: tl.int32,  # rows and columns of an exit
    align_corners: tl.int32,
    R: tl.constexpr,
    X: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the output's rows and columns lie on every exit, in whole numbers. See csrc/axis.h."""
    A: tl.constexpr = weights.dtype.element_ty
    i, rows = tl.program_id(1), tl.program_id(2) == 0
    h, w, _, _, _ = row_of(sizes, i)
    size = tl.where(rows, h, w)
    to = tl.where(rows, H, W).to(tl.int64)
    tile = tl.where(rows, R, X)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    N: tl.constexpr = len(sizes)
    put = i * (H + W).to(tl.int64) + tl.where(rows, 0, H) + o

    aligned = align_corners != 0
    numerator = tl.where(aligned, o * (size - 1), tl.maximum((2 * o + 1) * size - to, 0))
    denominator = tl.where(aligned, tl.maximum(to - 1, 1), 2 * to)
    low = tl.maximum(tl.minimum(numerator // denominator, size - 2), 0)
    weight = tl.minimum((numerator - low * denominator).to(A) / denominator.to(A), 1.0)
    weight = tl.where(size == 1, 0.0, weight)
    tl.store(places + put, low.to(tl.int32), mask=o < to)
    tl.store(weights + put, weight, mask=o < to)

    # Position o of the exit is in tiles that have an output position whose low is o - 1 or o; where the exit is larger,
    # there may be none, and else a single tile, whose number does not matter.
    begin, end = _first(o - 1, size, to, aligned), _first(o + 1, size, to, aligned)
    first, last = tl.maximum(begin - HALO, 0) // (tile - HALO), tl.maximum(end - 1 - HALO, 0) // (tile - HALO)
    if HALO:
        first, last = tl.where(size > to, 0, first), tl.where(size > to, tl.where(begin < end, 0, -1), last)
    part = parts + i * most.to(tl.int64) + tl.where(rows, 0, h) + o
    tl.store(part, first.to(tl.int32), mask=o < size)
    tl.store(part + N * most.to(tl.int64), last.to(tl.int32), mask=o < size)


@triton.jit
def _first(low, size, to, aligned):
    """The first position of the output that lies on or after `low`; `to` where there is none."""
    numerator = tl.where(aligned, low * (to - 1), (2 * low + 1) * to - size)
    denominator = tl.where(aligned, tl.maximum(size - 1, 1), 2 * size)
    position = tl.minimum((numerator + denominator - 1) // denominator, to)
    beyond = tl.where(aligned & (to == 1), 1, size - 1)  # a single position of the output lies on the first
    return tl.where(low <= 0, 0, tl.where(low >= beyond, to, position))


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
def tile_of(number, H, W, X: tl.constexpr, BP: tl.constexpr, HALO: tl.constexpr = 0):
    """First row and column of a tile of an image, which of its pixels there are, and where they are in the image."""
    p = tl.arange(0, BP)
    across = tiles_along(W.to(tl.int32), X, HALO)
    y0, x0 = number // across * (BP // X - HALO), number % across * (X - HALO)
    y, x = y0 + p // X, x0 + p % X
    return y0, x0, (y < H) & (x < W), y.to(tl.int64) * W + x


@triton.jit
def own(y0, x0, inside, X: tl.constexpr, BP: tl.constexpr):
    """Which pixels of a tile with a halo are in no other: all but its first row and column, save the image's own."""
    y, x = tl.arange(0, BP) // X, tl.arange(0, BP) % X
    return inside & ((y0 + y == 0) | (y > 0)) & ((x0 + x == 0) | (x > 0))


@triton.jit
def taps(resized, i, y0, x0, H, W, X: tl.constexpr, PATCH: tl.constexpr, BP: tl.constexpr, LARGER: tl.constexpr = 0):
    """A tile's patch of exit i: its first row and column, and in it every pixel's four elements and their weights.

    Of a larger exit: their rows and columns in the exit.
    """
    places, weights = _places_and_weights(resized, i, H, W)
    top, bottom, left, right, weight = _corners(places, weights, y0, x0, H, W, X, BP)
    weight = (weight[0][None, :], weight[1][None, :], weight[2][None, :], weight[3][None, :])
    if LARGER != 0 and (LARGER >> i) & 1 != 0:
        return top[None, :], bottom[None, :], left[None, :], right[None, :], weight
    else:
        row, column = tl.load(places + y0), tl.load(places + H + x0)
        top, bottom, left, right = (top - row) * PATCH, (bottom - row) * PATCH, left - column, right - column
        corners = tl.join(tl.join(top + left, top + right), tl.join(bottom + left, bottom + right))
        return row, column, corners[None, :, :, :], weight


@triton.jit
def logits(
    exits, strides, resized, on, i, b, y0, x0, c0, C, counted, label, FULL: tl.constexpr, SAME: tl.constexpr,
    X: tl.constexpr, PATCH: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, EVERY: tl.constexpr,
    A: tl.constexpr, LARGER: tl.constexpr = 0,
):  # fmt: skip
    """Logits [BC, BP] of exit i, whose taps are `on`, of channels from c0 on; 0 at pixels that do not count.

    With labels [BP], which are from c0 on, the last channel, which is none, is the label's.
    """
    sizes, places, weights, copies = resized
    step_b, step_c, step_h, step_w = row_of(strides, i)
    exit = picked(exits, i) + b * step_b + c0 * step_c
    c = tl.arange(0, BC)
    channel = c[:, None]
    if label is not None:
        channel = tl.where(channel == BC - 1, label[None, :], channel)
    if FULL != 0 and (FULL >> i) & 1 != 0:
        at = channel * step_c + _in_image(step_h, step_w, y0, x0, X, BP)[None, :]
        z = widened(tl.load(exit + at, mask=(c0 + channel < C) & counted[None, :], other=0.0), A)
    elif LARGER != 0 and (LARGER >> i) & 1 != 0:  # few elements of a patch would be needed
        top, bottom, left, right, weight = on
        read = (c0 + c < C)[:, None] & counted[None, :]
        exit += (c * step_c)[:, None]
        z = _interpolated(exit, top, bottom, left, right, weight, step_h, step_w, read, A)
    else:
        row, column, corners, weight = on
        k = tl.arange(0, PATCH * PATCH)
        y, x = row + k // PATCH, column + k % PATCH
        h, w, _, _, _ = row_of(sizes, SAME if SAME >= 0 else i)
        there = (y < h) & (x < w)
        place = (c * step_c)[:, None] + (y * step_h + x * step_w)[None, :]
        if not WIDE:
            place = place.to(tl.int32)
        patch = widened(tl.load(exit + place, mask=(c0 + c < C)[:, None] & there[None, :], other=0.0), A)
        index = (channel * (PATCH * PATCH))[:, :, None, None] + corners
        four = tl.gather(tl.reshape(patch, [BC * PATCH * PATCH]), tl.reshape(index, [BC * BP * 4]), 0)
        top, bottom = tl.split(tl.reshape(four, [BC, BP, 2, 2]))
        top_left, top_right = tl.split(top)
        bottom_left, bottom_right = tl.split(bottom)
        z = _mixed(weight, top_left, top_right, bottom_left, bottom_right)
        if not EVERY:
            z = tl.where(counted[None, :], z, 0.0)
    return z


@triton.jit
def row(
    exits, strides, resized, on, i, b, y0, x0, C, counted, label, FULL: tl.constexpr, SAME: tl.constexpr,
    X: tl.constexpr, PATCH: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    EVERY: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Logits of all channels, a tuple of K tiles as above."""
    z = ()
    for k in tl.static_range(K):
        z += (
            logits(
                exits, strides, resized, on, i, b, y0, x0, k * BC, C, counted, label, FULL, SAME, X, PATCH, BC, BP,
                WIDE, EVERY, A,
            ),
        )  # fmt: skip
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
        z = _interpolated(exit, top, bottom, left, right, weight, step_h, step_w, counted, A)
    return z


@triton.jit
def _interpolated(exit, top, bottom, left, right, weight, step_h, step_w, read, A: tl.constexpr):
    above, below, left, right = exit + top * step_h, exit + bottom * step_h, left * step_w, right * step_w
    top_left = tl.load(above + left, mask=read, other=0.0).to(A)
    top_right = tl.load(above + right, mask=read, other=0.0).to(A)
    bottom_left = tl.load(below + left, mask=read, other=0.0).to(A)
    bottom_right = tl.load(below + right, mask=read, other=0.0).to(A)
    return _mixed(weight, top_left, top_right, bottom_left, bottom_right)


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
    resized, i, y0, x0, H, W, X: tl.constexpr, L: tl.constexpr, BP: tl.constexpr, TALL: tl.constexpr = 0,
    BROAD: tl.constexpr = 0, HALO: tl.constexpr = 0,
):  # fmt: skip
    """What a tile's rows [R, L] and columns [X, L] weigh in its patch of exit i."""
    places, weights = _places_and_weights(resized, i, H, W)
    tall: tl.constexpr = TALL != 0 and (TALL >> i) & 1 != 0
    broad: tl.constexpr = BROAD != 0 and (BROAD >> i) & 1 != 0
    down = _matrix(places, weights, y0, H, BP // X, L, tall, HALO)
    return down, _matrix(places + H, weights + H, x0, W, X, L, broad, HALO)


@triton.jit
def _matrix(
    places, weights, start, size, FROM: tl.constexpr, TO: tl.constexpr, LARGER: tl.constexpr, HALO: tl.constexpr
):
    o = start + tl.arange(0, FROM)
    low = tl.load(places + tl.minimum(o, size - 1))[:, None]
    weight = tl.load(weights + tl.minimum(o, size - 1))[:, None]
    if LARGER:
        k = _pairs(places, start, size, TO)[None, :]
    else:
        k = tl.load(places + start) + tl.arange(0, TO)[None, :]
    matrix = tl.where(low == k, 1.0 - weight, tl.where(low + 1 == k, weight, 0.0))
    if HALO and not LARGER:
        matrix = tl.where(((o == 0) | (o > start))[:, None], matrix, 0.0)
    return matrix


@triton.jit
def _pairs(places, start, size, TO: tl.constexpr):
    """A larger exit's patch: two positions for each of the output's."""
    k = tl.arange(0, TO)
    return tl.load(places + tl.minimum(start + k // 2, size - 1)) + k % 2


@triton.jit
def _destination(
    places, start, size, most, FROM: tl.constexpr, TO: tl.constexpr, LARGER: tl.constexpr, HALO: tl.constexpr
):
    """For a side of a patch, where copies begin, their positions from there on, and which are written.

    All tiles share a larger exit's copy, of which each writes its own positions. If one is between two pairs of the
    output's, it is written as the first of the later.
    """
    k = tl.arange(0, TO)
    if LARGER:
        o, at = start + k // 2, _pairs(places, start, size, TO)
        mine = (k < 2 * FROM) & (o < size) & ((o == 0) | (o > start))
        alone = (o + 1 >= size) | (tl.load(places + tl.minimum(o + 1, size - 1)) != at)
        return 0, at, mine & ((k % 2 == 0) | alone)
    else:
        return start // (FROM - HALO), k, k < most


@triton.jit
def put(
    grad, to, strides, resized, the_matrices, i, b, y0, x0, H, W, c0, C, inside, FULL: tl.constexpr,
    SAME: tl.constexpr, X: tl.constexpr, L: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    EXACT: tl.constexpr, TALL: tl.constexpr = 0, BROAD: tl.constexpr = 0, HALO: tl.constexpr = 0,
):  # fmt: skip
    """Writes a tile's gradient [BC, BP] of channels from c0 on: to its place in `to`, or summed up to the tile's copy.

    It is 0 where there is no pixel. An exit that is larger both ways needs no copies: its sums go to `to`, too.
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
        places, weights = _places_and_weights(resized, i, H, W)
        tall: tl.constexpr = TALL != 0 and (TALL >> i) & 1 != 0
        broad: tl.constexpr = BROAD != 0 and (BROAD >> i) & 1 != 0
        tile_y, row, in_rows = _destination(places, y0, H, rows, R, L, tall, HALO)
        tile_x, column, in_columns = _destination(places + H, x0, W, columns, X, L, broad, HALO)
        c, row, column = tl.arange(0, BC)[:, None, None], row[None, None, :], column[None, :, None]
        there = (c0 + c < C) & in_columns[None, :, None] & in_rows[None, None, :]
        if tall and broad:
            step_b, step_c, step_h, step_w = row_of(strides, i if len(strides) == 1 else N + i)
            begin = to + b * step_b
            place = (c0 + c) * step_c + row * step_h + column * step_w
        else:
            tiles_down = 1 if tall else tiles_along(H, R, HALO)
            pitch = columns if broad else tiles_along(W, X, HALO) * columns
            begin = copies + copy + (b * tiles_down + tile_y) * C * rows * pitch + tile_x * columns
            place = ((c0 + c) * rows + row) * pitch + column
        if not WIDE:
            place = place.to(tl.int32)
        tl.store(begin + place, tl.reshape(summed, [BC, L, L]).to(begin.dtype.element_ty), mask=there)


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


@triton.jit(do_not_specialize=["B", "C", "H", "W", "most"])
def collect_kernel(
    copies,  # [B, tiles down, C, rows, tiles across, columns] of A of every exit; a larger one has 1 tile that way
    grads,  # N tensors (B, C, h, w); those not in COLLECTED stand for none
    strides,  # (b, c, h, w) of each, coded
    sizes,
    places,
    parts,
    B: tl.int32,
    C: tl.int32,
    H: tl.int32,
    W: tl.int32,
    most: tl.int32,
    COLLECTED: tl.constexpr,  # bits: exits that have copies
    R: tl.constexpr,
    X: tl.constexpr,
    HALO: tl.constexpr,
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
        low = places + i * (H + W).to(tl.int64)
        first, last = parts + i * most.to(tl.int64), parts + (N + i) * most.to(tl.int64)
        first_y, last_y = tl.load(first + y), tl.load(last + y)
        first_x, last_x = tl.load(first + h + x), tl.load(last + h + x)
        down, across = tiles_along(H, R, HALO), tiles_along(W, X, HALO)
        if HALO:  # a larger exit's copy begins where the exit does
            down, across = tl.where(h > H, 1, down), tl.where(w > W, 1, across)
        pitch = across * columns
        total = tl.zeros([BLOCK], A)
        for tile_y in range(first_y, last_y + 1):
            row_in_copy = y - tl.load(low + tile_y * (R - HALO))
            if HALO:
                row_in_copy = tl.where(h > H, y, row_in_copy)
            place = copies + copy + ((b * down + tile_y) * C * rows + row_in_copy) * pitch + c * (rows * pitch)
            for k in range(tl.max(last_x - first_x, 0) + 1):
                tile_x = first_x + k
                here = inside & (tile_x <= last_x)
                column = x - tl.load(low + H + tile_x * (X - HALO), mask=here, other=0)
                if HALO:
                    column = tl.where(w > W, x, column)
                total += tl.load(place + tile_x * columns + column, mask=here, other=0.0)
        to = picked(grads, i)
        place = b * step_b + c * step_c + y * step_h + x * step_w
        tl.store(to + place, total.to(to.dtype.element_ty), mask=inside)
