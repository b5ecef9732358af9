"""LLaMA weights on disk: a model folder is a Hugging Face folder with a manifest. Knows nothing of ranks or training.

Read next: `folder.py` (reading), `writer.py` (writing), `importer.py` (a verified copy).
"""
