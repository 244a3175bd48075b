"""Patch transformers models: replace forward and attention, read their structure, follow accelerate's hooks."""
