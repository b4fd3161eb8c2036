"""Plans scoring jobs, forecasts their cost and commits their shards."""
