"""A running stack watched by the real Prometheus, with the project's own configuration."""
