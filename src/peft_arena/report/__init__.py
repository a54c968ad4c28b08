"""Static reports made from the analysis and the tables only: figures, tables, one self-contained page. Never torch."""
