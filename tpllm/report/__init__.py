"""Run records → tables, figures, and what a model of the step's time says beside them."""
