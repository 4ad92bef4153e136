"""`python -m isthmus.models.bundle`."""

from isthmus.models.bundle.cli import main

main()
