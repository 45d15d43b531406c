"""Studies: the arms of an experiment side by side, over several seeds, as a table and a picture."""
