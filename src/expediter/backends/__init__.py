"""What can be swapped by an address? Databases, caches and brokers, and the only code that knows their drivers."""
