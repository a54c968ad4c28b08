"""Methods whose change of a weight is another function of few numbers: of a basis, a network, circulants."""
