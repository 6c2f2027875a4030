"""Reports of finished runs and evaluations: tables, figures, and a page of them."""
