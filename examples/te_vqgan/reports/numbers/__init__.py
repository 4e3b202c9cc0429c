"""Numbers in prose, each tied to the data by a marker behind it."""
