"""How many replicas a model should have: decided from what its requests wait for."""
