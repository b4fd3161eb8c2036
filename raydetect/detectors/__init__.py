"""Detection algorithms: one file and one class each; none imports another."""
