"""The HTTP API: endpoints, tokens, limits and allowed URIs; imports neither Ray nor torch."""
