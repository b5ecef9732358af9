"""Pictures of a run from its metrics.jsonl and masks.npz, with numpy and matplotlib alone. Begin with `run.py`."""
