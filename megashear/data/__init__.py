"""From shards of text to batches of tokens, on a mixture that follows the losses. Knows nothing of models.

Preprocessing, in the order the text walks: `inputs.py`, `shards.py`, `parquet.py`, `domains.py`,
`tokenizer.py`, `parts.py`, `duplicates.py`, `heldout.py`, `merge.py`, `report.py`; `preprocess.py` leads through them.
On disk: `indexed.py` (one pair of files), `blocks.py` (its digests), `manifest.py` (the dataset folder), `verify.py`;
`documents.py`, `join.py` and `adopt.py` for pairs that others made; `estimate.py` before anything is made.
Training: `samples.py`, `blend.py`, `loader.py`, and the weights: `references.py`, `mixture.py`, `published.py`.
"""
