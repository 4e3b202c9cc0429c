"""The commands: their options, their plans, and what they run."""
