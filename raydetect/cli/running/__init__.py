"""Commands that run a job and start from a folder too: fit and score; where a job runs."""
