"""Tiers: which parameters move together, and when."""
