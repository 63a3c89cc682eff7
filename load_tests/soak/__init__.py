"""The soak: hours of ordinary traffic with churn, and whether anything grows meanwhile."""
