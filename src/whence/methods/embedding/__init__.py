"""Data Value Embedding: a vector for every visit."""
