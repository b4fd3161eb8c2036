"""Reports: a results directory as one HTML file."""
