"""Score a frozen encoder: features once, then kNN or a linear classifier."""
