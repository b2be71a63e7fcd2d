"""`python -m safe_decode` is `safe-decode`."""

from safe_decode.cli.main import main

main()
