"""`python -m hata`: the `hata` command."""

from hata.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
