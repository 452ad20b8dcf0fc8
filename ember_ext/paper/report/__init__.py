"""The report on a reproduction: one page, in HTML and in Markdown, and its numbers."""
