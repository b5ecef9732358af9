"""Run files: sections, shapes, presets, checks. Knows nothing of torch."""
