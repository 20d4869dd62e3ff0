"""Data Value Embedding (arXiv 2412.09538): a vector for every visit of every sample."""
