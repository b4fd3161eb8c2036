"""Archive runs started over HTTP."""
