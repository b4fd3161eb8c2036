"""From patch scores to anomaly maps."""
