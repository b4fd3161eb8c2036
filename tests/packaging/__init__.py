"""Tests of what is installed: the wheel, the source archive and the extras."""
