"""`python -m expediter` is the command line."""

from expediter.cli import main

main()
