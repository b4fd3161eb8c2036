"""Archives: encoded image bytes in, from tar, zip, Parquet or loose files."""
