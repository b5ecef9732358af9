"""LLaMA on megatron-core's parallel layers; masks enter as arguments, and without them it is a plain LLaMA.

Read in this order: `llama.py` (the whole model), `layer.py` (one decoder layer), `masking.py` (a rank's slices of the
masks), `placement.py` (which rows of which Hugging Face tensor a parameter holds), `load.py` and `save.py`.
"""
