"""Frameworks that train: one protocol, one module for each."""
