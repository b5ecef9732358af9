"""The compiled form of the ops, as torch custom ops over the kernels of csrc/: autograd, fake tensors, CPU and CUDA.

`library.py` loads what was built and launches it; each other file is one op. Their meaning stands in `../reference.py`.
"""
