"""`yuanmoe data`: options, and a document shown with what is learned of it."""
