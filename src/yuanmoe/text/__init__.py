"""Text to token ids and back: tokenizers, chat formats, detokenizing. Not datasets. No torch here."""
