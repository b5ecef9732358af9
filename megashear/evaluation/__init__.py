"""Held-out losses and perplexity of models, and the lm-evaluation-harness adapter."""
