"""Derivatives of optimizer updates."""
