"""LLaMA on megatron-core's parallel layers; masks enter as arguments, and without them it is a plain LLaMA."""
