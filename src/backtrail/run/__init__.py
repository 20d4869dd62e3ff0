"""A finished recording; read-only."""
