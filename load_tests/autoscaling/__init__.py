"""A simulated day of a model that is scaled, by our policy and by Ray's.

python -m load_tests.autoscaling
"""
