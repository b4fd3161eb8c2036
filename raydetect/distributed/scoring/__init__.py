"""Scoring on Ray Data."""
