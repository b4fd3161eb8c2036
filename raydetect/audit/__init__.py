"""Audits: what came since the last one is scored, compared with the nights before, and judged by rules."""
