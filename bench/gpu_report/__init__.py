"""Everything that must be measured on a GPU, in the few minutes that one is available."""
