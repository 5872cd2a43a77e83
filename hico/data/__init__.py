"""Rows and batches, for training and evaluation alike: files of rows, mixtures, examples, lengths, batches."""
