"""`python -m raydetect` is the command `raydetect`."""

from raydetect.cli.main import main

main()
