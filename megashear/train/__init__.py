"""Training: step, loop with callbacks, learning-rate schedules, teacher, metrics, progress line."""
