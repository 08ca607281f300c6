"""One self-contained HTML file each. No numbers of their own."""
