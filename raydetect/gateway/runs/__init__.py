"""Archive runs that are started over HTTP."""
