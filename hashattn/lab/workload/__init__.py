"""Real models, real texts and questions about them: what the demo, capture, fit and eval work on."""
