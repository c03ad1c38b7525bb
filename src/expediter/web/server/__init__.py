"""The socket, how many are let in, what one connection may cost, and a line for each request."""
