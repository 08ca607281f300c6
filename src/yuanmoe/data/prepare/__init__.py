"""Text to datasets: read in one process, tokenized in several, written in order, resumed after any end."""
