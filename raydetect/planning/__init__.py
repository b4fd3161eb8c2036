"""What is left of a scoring job, and how its shards are committed."""
