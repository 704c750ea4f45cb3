"""From the results of many runs to the statements of the paper: fits, frontiers, comparisons."""
