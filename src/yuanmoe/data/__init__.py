"""Text on its way to tokens to train on: corpora, datasets, batches. No torch here."""
