"""Prefect flows: the stages chained, served, scheduled, and told of on Prefect's pages."""
