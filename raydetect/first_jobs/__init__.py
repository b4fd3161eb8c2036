"""Looks at a source of images and chooses the jobs to begin with, with a reason for each setting."""
