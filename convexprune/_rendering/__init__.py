"""What a run came to: facts in words, made once of its report, and the model card and the page that show them."""
