"""The OpenAI API: paths, the JSON that is understood, and answers in its shapes."""
