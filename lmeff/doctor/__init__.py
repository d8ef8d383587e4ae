"""What can be wrong with a machine, or with the hosts of a pod, before a run begins: one line a check, each with its remedy."""
