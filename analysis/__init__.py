"""Turns run folders or W&B runs into one DataFrame, tables, figures and a report. Knows records, but no models.

Whatever reads what a user named, or writes where they said, raises UserError where that cannot be: a wrong argument, a
source that does not exist or holds no run, or none of those asked for, runs that cannot be compared, a folder that
cannot be written.
"""
