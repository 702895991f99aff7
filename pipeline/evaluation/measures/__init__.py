"""Measurements of students and their teacher: quality, fidelity, calibration, cost."""
