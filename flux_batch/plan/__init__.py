"""The work of a run and its cost: data set -> ordered shards; knows no cluster."""
