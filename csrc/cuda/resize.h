// Exits of another size than the output's: how the output is cut so that their gradients have owners. Host and device.
//
// An output of H x W is cut into bands of rows and strips of columns. A block takes a band of a strip at a time, walks
// down it, and alone adds to its private copy of the part of the gradient that lies under it, in global memory. Copies
// overlap by a few rows and columns; the last kernel adds them up, in order.
//
// Exits none of which is larger than the output, with nothing rare asked for, have a kernel of their own, which does
// half the work: small_exits.h. What follows is about the general one.
//
// A tile is two rows of a strip. For each exit, the block first draws lines: of each two neighbouring columns of the
// exit's two rows, what is interpolated from, in shared memory. A thread's pixels lie below each other; from one load
// and two multiplications a channel, each of its rows takes another one. On the way back a thread adds up its rows for
// the exit's row above and the one below; cells of pixels between the same two columns are summed for both of these;
// the sums of cells are added up for each column, at the exit's own resolution. Rows of a tile that lie between others
// of the exit's rows are another span, and go this way again.
//
// Why so. Counted, not measured: no GPU has run this. Instructions an output pixel, channel and exit, executed for one
// block of five exits at an eighth of (8, 21, 512, 512), two of them teachers, float32, sm_90, 168 registers:
// - In all 53, of which the losses and the gradient take 21; 8 warps a multiprocessor. In all issue slots of an H200
//   (132 x 4 x 1.75 GHz) that is 0.39 ms. The kernel of its own: 25, and 12 warps.
// - Without lines, each thread interpolating from global memory, from column to pixel first, and then a thread a column
//   that summed the pixels on both sides of it, each pixel twice: 65.
// - Lines of an exit at the full size leave room for one block. An exit wider than the strip is drawn pixel by pixel:
//   slow, but rare.
// - A gather (each element looks up its pixels) has to compute softmaxes four times, or to keep B x C x H x W of them.
// - Copies in global memory, not in shared memory: what a tile adds is a fraction of what it computes, and shared
//   memory is what limits the number of blocks. They are 1.3 to 1.7 times the gradients, of exits at an eighth of the
//   size.
#pragma once

#include "../axis.h"

namespace selfreg {

// How an output is cut.
struct Cut {
  int64_t height, width;                 // of the output
  int32_t rows, columns, bands, strips;  // of a band, of a strip; bands of a strip, strips of an image
};

// The private copies of an exit's gradient: [B, bands, strips, rows, columns, C] of A.
struct Copies {
  int64_t rows, columns;  // at most
  SELFREG_AXIS Copies(const Cut& cut, int64_t h, int64_t w, bool align_corners)
      : rows(Axis{h, cut.height, align_corners}.most(cut.rows)),
        columns(Axis{w, cut.width, align_corners}.most(cut.columns)) {}
  // In numbers: where the copy of one band begins.
  SELFREG_AXIS int64_t begin(const Cut& cut, int64_t image, int64_t band, int64_t strip, int64_t C) const {
    return ((image * cut.bands + band) * cut.strips + strip) * rows * columns * C;
  }
};

}  // namespace selfreg
