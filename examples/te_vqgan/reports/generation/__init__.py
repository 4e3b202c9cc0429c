"""Tables and figures of both generation tasks, next to the paper's."""
