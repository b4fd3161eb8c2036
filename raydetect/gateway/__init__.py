"""The HTTP door: tokens, limits, what may be named, and the endpoints; knows neither Ray nor torch."""
