"""What a model remembers of sequences: who came before a token, keys and values, and where they are kept."""
