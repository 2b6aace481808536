"""The kinds of task: a module for each, and what several of them share."""
