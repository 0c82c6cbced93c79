"""`python -m lorax`."""

from .cli import main

main()
