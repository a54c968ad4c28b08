"""From a study to finished runs: the plan, the workers, many runs on one machine."""
