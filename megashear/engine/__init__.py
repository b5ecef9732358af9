"""The distributed engine: the only room that touches megatron-core and the device. Knows nothing of masks or data.

Read in this order: `device.py` (CUDA, or the CPU in its stead), `layout.py` (ranks and groups), `parallel.py` (layers),
`pipeline.py` (schedules), `optimizer.py` (gradient buffers, Adam, clipping), `sharded.py` (checkpoints).
"""
