"""The distributed engine, the only package that uses megatron-core and selects the device.

`device` selects CUDA or the CPU, `layout` creates process groups, `parallel` layers, `pipeline` runs schedules,
`optimizer` owns gradient buffers and Adam, and `sharded_checkpoint` reads and writes checkpoints.
"""

import gc
import warnings

# Users cannot act on these warnings about options, torch interfaces and optional libraries. `megashear env` reports the
# libraries in use.
warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\b")

# Imported objects are never freed. Collecting them takes a sixth of a rank's start-up time.
gc_was_enabled = gc.isenabled()
gc.disable()
try:
    from megashear.engine.startup import skip_compiler_import, uses_cuda

    if not uses_cuda():
        skip_compiler_import()
finally:
    gc.freeze()
    if gc_was_enabled:
        gc.enable()
