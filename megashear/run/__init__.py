"""A whole run: the stages of one run file in order, each taken up where it stopped.

Read in this order: `runner.py` (the walk), `context.py` (what stages share), `training.py` (prune and pretrain),
`finalize.py`, `summary.py` (what came of it).
"""
