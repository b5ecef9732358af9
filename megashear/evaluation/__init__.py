"""Held-out losses, and the lm-evaluation-harness adapter."""
