"""What leaves: a Hugging Face LLaMA folder that transformers has loaded and agreed with before it gets its name.

Read next: `folder.py` (the way out), `verify.py` (the proof), `model_card.py` (its README.md).
"""
