"""`python -m weightsmith`."""

from weightsmith.cli import main

main()
