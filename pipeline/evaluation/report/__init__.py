"""The report: records, sections, figures, page."""
