"""Thresholds of the checks on the rows."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CheckConfig:
    """Thresholds above which a share of rows becomes a warning. 0 warns about any row, 1 never warns."""

    near_duplicate_similarity: float
    """Two rows are near duplicates when their token 5-grams have at least this Jaccard similarity."""

    near_duplicate_share: float
    """Warn above this share of near duplicates."""

    overlap_share: float
    """A training row leaks when this share of its token 13-grams occurs in held-out rows."""

    overlap_rows_share: float
    """Warn above this share of overlapping_documents training rows."""

    smallest_trained_share: float
    """Warn when the share of trained tokens is below this."""

    largest_label_share: float
    """Warn when one answer makes up more than this share of the rows and answers repeat as labels do."""

    control_character_share: float
    """Warn above this share of rows with control characters."""

    secret_share: float
    """Warn above this share of rows with likely keys or passwords."""

    email_share: float
    """Warn above this share of rows with e-mail addresses."""
