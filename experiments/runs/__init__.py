"""Run folders: identity, state, locks, files."""
