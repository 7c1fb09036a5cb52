"""Graphs as text."""
