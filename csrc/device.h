// device.h: whether the device that this library was linked for can run its kernels.
#pragma once

#include <string>

namespace megashear {

// Returns why the kernels cannot run on the current device; empty if they can.
std::string device_problem();

}  // namespace megashear
