"""`python -m isthmus.models.language.checkpoint`."""

from isthmus.models.language.checkpoint.cli import main

main()
