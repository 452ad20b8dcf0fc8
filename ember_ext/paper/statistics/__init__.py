"""Measures of finished runs, and statistics over seeds."""
