"""From run folders or W&B to one DataFrame, tables, figures and a report. Reads records; knows no model."""
