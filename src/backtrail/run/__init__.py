"""Runs on disk: the files of a recording, and `Run`, which reads them."""
