"""Looks at what jobs need here: packages, weights, disks, memory, storage; says what to do about each finding."""
