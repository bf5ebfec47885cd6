"""Everything that only a GPU can tell, in the few minutes that one is there."""
