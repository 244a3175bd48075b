"""Processes, signals, console, devices."""
