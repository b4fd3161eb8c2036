"""One worker's work, free of Ray."""
