"""Phases of a run: prune, finalize, pretrain, export; and the runner."""
