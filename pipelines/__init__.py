"""The research pipeline: configured runs of the `griffin` library, and their records."""
