"""What all measurements share: intervals, the range of pixel values, and how figures are written."""
