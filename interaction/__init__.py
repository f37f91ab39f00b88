"""The interactor: the mask of one object from clicks and a box."""
