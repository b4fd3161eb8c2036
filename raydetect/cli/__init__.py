"""Commands that have their own module, and code shared by all commands."""
