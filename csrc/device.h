// device.h: whether the device that this library was linked for can run its kernels.
#pragma once

#include <string>

namespace megashear {

// Empty where kernels run on the current device, else the reason why not.
std::string device_problem();

}  // namespace megashear
