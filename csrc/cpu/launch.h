#pragma once

#include "../exit_loss.h"

namespace selfreg {

// Runs the launch on the CPU's threads. Throws std::invalid_argument for a label that is neither a class nor ignored.
void cpu_launch(const ExitLoss& launch);

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* cpu_isa();

}  // namespace selfreg
