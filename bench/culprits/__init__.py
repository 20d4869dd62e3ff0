"""Planted rows that a training memorises a wrong answer from, and how methods find them."""
