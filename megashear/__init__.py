"""megashear: targeted structured pruning of LLaMA models, and continued pre-training on a dynamic mixture."""

__version__ = "0.1.0"
