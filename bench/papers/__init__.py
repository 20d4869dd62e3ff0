"""Figures of papers, measured here."""
