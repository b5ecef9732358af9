"""Files that are whole or absent: atomic writes, manifests of digests, the lock of a run. Knows nothing of tensors."""
