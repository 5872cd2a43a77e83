"""Tensor maths: pure functions, tensors in, tensors out."""
