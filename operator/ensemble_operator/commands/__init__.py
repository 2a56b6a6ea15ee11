"""The subcommands of `ensemble`: a module each, with `add_to(subparsers)` and a function from arguments to exit code.

A command imports what it runs when it runs: `ensemble --help` should not wait for aiohttp.
"""
