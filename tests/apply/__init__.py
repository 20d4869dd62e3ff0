"""Tests of what people do with influence."""
