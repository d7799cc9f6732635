"""Scores on the new task and on everything known before, the gate over them, and the report of both."""
