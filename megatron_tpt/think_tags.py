"""The tags around thinking: in our data, in chat templates, and in what models write."""

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"
