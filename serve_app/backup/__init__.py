"""Backups of the accounts: dumps with their manifests, and the ring of subject keys."""
