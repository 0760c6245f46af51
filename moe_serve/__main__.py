"""``python -m moe_serve`` is the ``moe-serve`` command."""

from moe_serve.cli.app import main

if __name__ == "__main__":
    main()
