"""One module for each archive format: tar, zip, Parquet, loose files."""
