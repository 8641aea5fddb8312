"""What the command `inarch` and `python -m inarch` run."""

from .core.interrupt import importing

with importing():
    from .cli import main

if __name__ == "__main__":
    main()
