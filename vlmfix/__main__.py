"""`python -m vlmfix`."""

from vlmfix.cli import main

if __name__ == "__main__":
    main()
