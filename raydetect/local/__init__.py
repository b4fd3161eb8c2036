"""Runs a whole job or server in one process, without Ray."""
