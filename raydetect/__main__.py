"""`python -m raydetect` is the command `raydetect`."""

from raydetect.cli import main

main()
