"""LLaMA on parallel layers: forward pass with masks, computed units, placement of tensors on ranks."""
