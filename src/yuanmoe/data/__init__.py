"""Text on its way to token ids and back: tokenizers, conversations, streams, corpora. No torch here."""
