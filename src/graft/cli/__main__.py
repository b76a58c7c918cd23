"""`python -m graft.cli`."""

from . import main

main()
