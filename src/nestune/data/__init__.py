"""Records and their formats, validation, tokens with their masks, and batches."""
