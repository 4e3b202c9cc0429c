"""The result of a measurement: values, tables and pictures."""
