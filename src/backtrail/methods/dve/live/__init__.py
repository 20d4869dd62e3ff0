"""Experimental: captures per-sample gradient sketches while the training runs."""
