"""Sealing: texts at rest are encrypted with a key of the person whose they are.

Master keys (from the settings) wrap the keys of subjects (in PostgreSQL), and those seal texts.
"""
