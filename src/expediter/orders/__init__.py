"""What is an order, and what may happen to it? Pure: no clock, no chance, no I/O."""
