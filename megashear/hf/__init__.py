"""Hugging Face model folders: read, write, import, export, verify. Knows nothing of ranks or training."""
