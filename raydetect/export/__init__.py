"""Exports rows, outlines and flagged images of a run for spreadsheets and labelling tools."""
