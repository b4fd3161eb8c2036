"""Exports: a run's rows, outlines and flagged images for spreadsheets and labelling tools."""
