"""Generated from the schemas in images/ at the top of the repository, by images/generate. Not to be edited."""
