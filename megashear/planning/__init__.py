"""`megashear check`: problems, warnings and cost estimates of a run file. Imports neither torch nor numpy."""
