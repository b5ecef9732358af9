// controls.cpp: what tests ask of the machine and tell it, through ctypes.
#include "machine.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Whether threads, warps and blocks run from the last to the first.
EXPORTED void emulation_descend(int wanted) { emulation::machine.descending = wanted != 0; }

EXPORTED uint64_t emulation_bank_conflicts() { return emulation::machine.conflicts; }
