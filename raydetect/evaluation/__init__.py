"""Evaluation: cells of detector, data and seed; their metrics; the leaderboard."""
