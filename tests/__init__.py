"""Tests of whence; the folders mirror src/whence."""
