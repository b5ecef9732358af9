"""Run files: schema, loading, presets and derived values, without torch."""
