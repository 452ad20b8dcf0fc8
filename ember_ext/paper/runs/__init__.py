"""The runs behind the paper: planned, carried out in processes, and what they leave."""
