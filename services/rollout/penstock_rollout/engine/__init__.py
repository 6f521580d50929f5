"""Everything that Penstock says to SGLang, and nothing else does."""
