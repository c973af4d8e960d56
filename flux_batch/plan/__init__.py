"""What will be done and what it costs: data set -> ordered shards; knows no cluster."""
