"""The networks, one method a module."""
