"""The claims of the paper, each with a rule that judges it."""
