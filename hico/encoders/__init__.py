"""Vision encoders: clips of frames in, tokens out. Look them up in ``hico.registry.ENCODERS``."""
