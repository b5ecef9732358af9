"""A run's checkpoints: whole or absent, verified by digest, loadable on another layout.

Read in this order: `state.py` (what a phase's state is), `store.py` (folders, retention, the newest valid one),
`pickles.py` (why reading one cannot run code).
"""
