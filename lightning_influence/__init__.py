"""Influence of training examples and interaction-aware data selection for Lightning."""
