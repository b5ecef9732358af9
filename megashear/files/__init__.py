"""Atomic writes, digests of folders, and the lock of a run folder. Knows nothing of tensors."""
