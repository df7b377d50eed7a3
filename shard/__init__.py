"""One tensor-parallel rank of a model on one device."""
