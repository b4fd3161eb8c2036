"""Reports: what a results directory holds, as one HTML file for people."""
