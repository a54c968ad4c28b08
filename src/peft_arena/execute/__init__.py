"""From a study file to finished runs: reading, planning, many runs on one machine."""
