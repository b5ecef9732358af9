// device_cpu.cpp: the CPU runs every kernel that was compiled for its architecture.
#include "device.h"

namespace megashear {

std::string device_problem() { return ""; }

}  // namespace megashear
