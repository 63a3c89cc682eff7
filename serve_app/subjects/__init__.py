"""Rights of data subjects: all that is kept of one person, found, handed out and erased.

A subject is the id of a principal.
"""
