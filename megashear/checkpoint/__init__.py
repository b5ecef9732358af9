"""A run's checkpoints: whole or absent, verified by digest, loadable on another layout."""
