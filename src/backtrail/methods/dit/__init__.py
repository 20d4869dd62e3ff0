"""Dynamic Influence Tracker (arXiv 2502.10793): exact influence by one reverse sweep."""
