"""Turns run folders or W&B runs into one DataFrame, tables, figures and a report. Knows records, but no models."""
