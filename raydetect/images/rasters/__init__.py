"""Rasters: TIFF and JPEG 2000 read window by window, with any number of bands. Only `library.py` knows rasterio."""
