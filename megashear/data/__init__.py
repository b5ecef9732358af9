"""From shards of text to batches of tokens, on a mixture that follows the losses. Knows nothing of models.

Preprocessing, in the order the text walks: `shards.py`, `domains.py`, `tokenizer.py`, `preprocess.py`, `merge.py`.
On disk: `indexed.py` (one pair of files), `manifest.py` (the dataset folder).
Training: `samples.py`, `blend.py`, `loader.py`, and the weights: `references.py`, `mixture.py`, `published.py`.
"""
