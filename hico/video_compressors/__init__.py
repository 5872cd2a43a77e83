"""Video compressors: all tokens of one video in, fewer out. Look them up in ``hico.registry.VIDEO_COMPRESSORS``."""
