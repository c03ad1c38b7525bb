"""How do clients of another order service speak to this one? A table for each, and one place that follows it."""
