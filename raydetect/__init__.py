"""raydetect: distributed anomaly detection over image archives, on Ray."""

__version__ = "0.1.0"
