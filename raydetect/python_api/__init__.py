"""The detectors in Python: `create_model(...).fit(images).predict(images)`."""
