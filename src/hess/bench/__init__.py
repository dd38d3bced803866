"""How fast this package is on a machine: measurements as rows, and what the rows must show."""
