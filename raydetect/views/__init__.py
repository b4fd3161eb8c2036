"""Views: which parts of a picture a detector looks at. Knows neither files nor detectors."""
