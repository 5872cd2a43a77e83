"""A tiny world to learn from on a CPU: moving shapes as real video files, with captions and questions."""
