"""How good synthetic CT is: metrics, segmenters, and the tables and pictures of the paper."""
