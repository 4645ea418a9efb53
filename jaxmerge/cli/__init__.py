"""The `jaxmerge` command and the recipes that it runs."""
