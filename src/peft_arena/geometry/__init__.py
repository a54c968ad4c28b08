"""Why a method forgets: weight-space spectra, capability-conditioned drift, activation geometry."""
