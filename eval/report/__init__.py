"""The comparison as tables, samples and one HTML page."""
