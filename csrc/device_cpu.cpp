// device_cpu.cpp: kernels compiled for the CPU's architecture always run.
#include "device.h"

namespace megashear {

std::string device_problem() { return ""; }

}  // namespace megashear
