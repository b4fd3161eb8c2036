"""Scoring in one worker, without Ray."""
