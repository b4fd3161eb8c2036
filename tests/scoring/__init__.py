"""Tests of raydetect/scoring."""
