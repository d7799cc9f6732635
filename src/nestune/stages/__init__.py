"""The stages of the pipeline: plain functions with typed inputs, and files as outputs."""
