"""The calls, one file an area."""
