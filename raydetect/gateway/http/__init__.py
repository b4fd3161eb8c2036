"""The HTTP layer: routes, schemas, tokens, limits, errors."""
