"""The tables of the paper, with the numbers of this project beside the published ones."""
