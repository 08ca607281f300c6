"""What a run is to do: recipes, their names, and their settings by name."""
