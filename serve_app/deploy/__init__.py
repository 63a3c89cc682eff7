"""Changing what runs: plan, deploy, wait, look, and go back by itself where it fails."""
