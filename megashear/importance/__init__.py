"""How much each unit of a source model matters: one registry of criteria, one schema of scores."""
