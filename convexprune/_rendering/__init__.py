"""The result of a run for people: facts in words, the model card and the page."""
