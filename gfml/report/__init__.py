"""Pages, tables and plots of stored runs."""
