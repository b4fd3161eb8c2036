"""Sinks: write rows, heatmaps and the ledger, and read them back."""
