"""Expediter: takes orders, stores each one before it answers, and brings every one to rest."""

__version__ = "0.2.0"
