"""The compiled ops as torch custom ops over the kernels of csrc/: autograd, fake tensors, CPU and CUDA.

`library.py` loads and launches the kernels. Every other file registers one op, defined by `../reference.py`.
"""
