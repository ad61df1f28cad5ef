"""Networks that learn from themselves, or from labels made softer."""
