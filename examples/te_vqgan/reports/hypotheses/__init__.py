"""The confirmatory analysis that ``docs/preregistration.md`` fixes: its plan, tests, tables and figures."""
