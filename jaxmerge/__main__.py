"""`python -m jaxmerge`: the command line without an installed script."""

from jaxmerge.cli.main import main

if __name__ == "__main__":
    main()
