"""The short-to-long trainer: recipes, mixtures, batches, checkpoints. Run it with ``python -m hico.train``."""
