"""Learned masks: hard concrete variables, the Lagrangian that drives them to a target shape, keep sets, folding.

Knows nothing of models: a model takes `masks.Masks` as an argument. Start at `state.py`.
"""
