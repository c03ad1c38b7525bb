"""Webhooks: readers of the feed that tell others what has happened."""
