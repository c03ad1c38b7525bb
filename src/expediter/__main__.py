"""`python -m expediter` is the command line."""

from expediter.run.cli import main

main()
