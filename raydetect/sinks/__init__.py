"""Sinks: rows, heatmaps and the ledger out."""
