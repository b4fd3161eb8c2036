"""Pretrained networks as feature extractors."""
