"""Starting ranks: hosts, launchers and their dialects, and the batch script."""
