"""Reading the images of a fit."""
