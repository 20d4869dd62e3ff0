"""One file per published method; each turns a run and queries into an influence."""
