"""Checks on a GPU: correctness and speed (``make gpu``)."""
