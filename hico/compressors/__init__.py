"""Compressors: the tokens of one clip in, fewer tokens out. Look them up in ``hico.registry.COMPRESSORS``."""
