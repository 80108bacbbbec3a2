"""From signals and requests: which context, how likely, how soon. Pure and online; every probability is calibrated."""
