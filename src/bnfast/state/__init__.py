"""What a layer is outside of memory: dictionaries, pickles, files."""
