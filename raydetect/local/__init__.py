"""Runs a whole job or server in one process, without Ray."""

from raydetect.moved_modules import names_of

__getattr__ = names_of("raydetect.local", "raydetect.local.jobs")
