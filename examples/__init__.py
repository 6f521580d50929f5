"""Runnable examples; a package only so that the tests can import them."""
