"""Everything that is not needed to attend: capturing, fitting, judging, timing, the demo."""
