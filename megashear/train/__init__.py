"""Training: schedules, step, loop, and what a run shows of itself (metrics, progress line, tables)."""
