"""Evaluation: cells of detectors, data and seeds; their figures; the leaderboard."""
