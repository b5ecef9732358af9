"""The distributed engine: the only room that touches megatron-core and the device. Knows nothing of masks or data.

Read in this order: `device.py` (CUDA, or the CPU in its stead), `layout.py` (ranks and groups), `parallel.py` (layers),
`pipeline.py` (schedules), `optimizer.py` (gradient buffers, Adam, clipping), `sharded.py` (checkpoints).
"""

import gc
import warnings

# What megatron-core says of its own options, of torch's interfaces and of optional libraries is nothing that a user
# could act on in the midst of a run; `megashear env` tells which libraries serve.
warnings.filterwarnings("ignore", module=r"(megatron\.core|torch\.distributed)\b")

# Everything that is imported stays: searching it for garbage, then and later, takes a sixth of a rank's start.
collects = gc.isenabled()
gc.disable()
try:
    from megashear.engine.startup import on_cpu_host, skip_compiler_import

    if on_cpu_host():
        skip_compiler_import()
finally:
    gc.freeze()
    if collects:
        gc.enable()
