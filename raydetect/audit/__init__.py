"""Audits: score what is new since the last audit, compare it with earlier nights, and judge it by rules."""
