"""The interactor: one object outlined from clicks and a box."""
