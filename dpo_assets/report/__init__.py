"""Tables and plots for the UI, small enough to live in an event log."""
