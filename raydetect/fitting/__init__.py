"""One worker's part of a fit, without Ray."""
