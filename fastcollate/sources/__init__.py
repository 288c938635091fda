"""Files, URLs and data sets -> blocks -> records, each with its place in the sources."""
