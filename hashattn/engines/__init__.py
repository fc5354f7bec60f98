"""Which engine serves a step, and how."""
