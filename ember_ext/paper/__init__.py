"""The study of the paper: its corpora, training, runs, statistics, verdicts, figures and report.

The library, which is the rest of `ember_ext`, imports nothing from here.
"""
