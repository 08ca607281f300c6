"""What a model does with a text: likelihood, routing, and which settings its weights want."""
